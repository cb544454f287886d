"""Equal layers share one graph while it is compiled; those that differ in what a graph may read do not."""

from __future__ import annotations

from collections.abc import Callable

import mindspore as ms
import numpy as np
import pytest
from mindspore import Parameter, Tensor, nn, ops

from mindpeft import LoraConfig, OFTConfig, PrefixTuningConfig, get_peft_model
from mindpeft.compiling import CompiledCell
from mindpeft.config import PeftConfig
from mindpeft.models import AutoModelForCausalLM
from mindpeft.nn import Linear
from mindpeft.ops.dropout import dropout, seed_dropout
from mindpeft.shared_layers import SWITCH, SharedLayers
from mindpeft.structure import structure
from mindpeft.train.optim import AdamW
from mindpeft.train.step import TrainStep
from tests.models.decoders import labels_of, make_decoder, make_texts
from tests.selection import default

pytestmark = pytest.mark.usefixtures("graph_mode")


class Layer(nn.Cell):
    """One of everything that a graph may depend on."""

    def __init__(self, factor: float = 2.0, size: int = 3):
        super().__init__()
        self.dense = Linear(size, size)
        self.dense.weight.set_data(Tensor(np.random.standard_normal((size, size)), ms.float32))
        self.factor = factor
        self.shift = Tensor(np.arange(size), ms.float32)
        self.sum = ops.ReduceSum(keep_dims=True)
        self.options = {"twice": False, "names": ("a", "b")}
        self.function: Callable | None = None

    def construct(self, x):
        y = self.dense(x) * self.factor + self.shift
        y = y + y if self.options["twice"] else y
        return y + self.sum(y, -1)


class Stack(CompiledCell):
    def __init__(self, *layers: nn.Cell):
        super().__init__()
        self.layers = nn.CellList(list(layers))

    def construct(self, x):
        for layer in self.layers:
            x = layer(x)
        return x


class Differentiated(CompiledCell):
    """What a cell gives, and the gradient of its sum."""

    def __init__(self, cell: nn.Cell):
        super().__init__()
        self.cell = cell

    def construct(self, x):
        def total(x):
            out = self.cell(x)
            return out.sum(), out

        (_, out), gradient = ms.value_and_grad(total, has_aux=True)(x)
        return out, gradient


def scaled(by: float) -> Callable:
    return lambda x: x * by


def freeze(layer):
    layer.dense.weight.requires_grad = False


def narrow(layer):
    layer.dense.weight.set_dtype(ms.float16)


def hook(layer):
    layer.register_forward_hook(lambda *_: None)


CHANGES = {
    "a number": lambda layer: setattr(layer, "factor", 3.0),
    "its type": lambda layer: setattr(layer, "factor", 2),
    "a constant": lambda layer: setattr(layer, "shift", layer.shift + 1),
    "a value in a dict": lambda layer: layer.options.update(twice=True),
    "an operator's attribute": lambda layer: setattr(layer, "sum", ops.ReduceSum(keep_dims=False)),
    "an operator": lambda layer: setattr(layer, "sum", ops.ReduceMax(keep_dims=True)),
    "what is trained": freeze,
    "a parameter's dtype": narrow,
    "a child": lambda layer: setattr(layer, "dense", nn.Dense(3, 3)),
    "no child": lambda layer: setattr(layer.dense, "bias", None),
    "training": lambda layer: layer.set_train(not layer.training),
    "a method": lambda layer: object.__setattr__(layer, "construct", lambda x: x),
    "a hook": hook,
    "a cell that is no child": lambda layer: object.__setattr__(layer, "other", nn.ReLU()),
    "a parameter that is not its own": lambda layer: layer.options.update(p=Parameter(Tensor(1.0))),
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_tells_layers_apart(change):
    one, other = Layer(), Layer()
    assert structure(one) == structure(other)
    CHANGES[change](other)
    assert structure(one) != structure(other)


def test_functions_are_compared_by_code_and_what_they_hold():
    layers = [Layer() for _ in range(3)]
    for layer, by in zip(layers, (2, 2, 3), strict=True):
        layer.function = scaled(by)
    same, again, different = map(structure, layers)
    assert same == again != different


def test_a_parameter_in_two_places_is_not_two_parameters():
    one, other = Layer(), Layer()
    for layer in (one, other):
        layer.second = Linear(3, 3)
    other.second.weight = other.dense.weight
    assert structure(one) != structure(other)


def test_a_cell_that_is_a_child_elsewhere_in_the_layer():
    one, other, outside = Layer(), Layer(), Linear(3, 3)
    for layer in (one, other):
        object.__setattr__(layer, "again", layer.dense)
    assert structure(one) == structure(other)
    object.__setattr__(other, "again", outside)
    assert structure(one) != structure(other)


def test_shapes_tell_apart():
    assert structure(Layer(size=3)) != structure(Layer(size=4))


@pytest.mark.parametrize("factors", [(2.0, 2.0, 2.0), (2.0, 3.0, 2.0), (1.0, 2.0, 3.0)])
def test_results(factors, monkeypatch):
    layers = [Layer(factor) for factor in factors]
    x = Tensor(np.random.standard_normal((4, 3)), ms.float32)
    shared = Stack(*layers)(x).asnumpy()
    monkeypatch.setenv(SWITCH, "0")
    np.testing.assert_array_equal(shared, Stack(*layers)(x).asnumpy())


def test_marks_are_there_only_while_it_compiles():
    stack = Stack(Layer(), Layer(), Layer(3.0))
    with SharedLayers() as sharing:
        sharing.mark(stack)
        marked = [hasattr(layer, "cell_init_args") for layer in stack.layers]
    assert marked == [True, True, False]
    assert not any(hasattr(layer, "cell_init_args") for layer in stack.layers)
    stack(Tensor(np.ones((4, 3)), ms.float32))
    assert not any(hasattr(layer, "cell_init_args") for layer in stack.layers)


def test_a_failed_compilation_leaves_no_mark():
    stack = Stack(Layer(), Layer())
    for layer in stack.layers:
        layer.shift = Tensor(np.ones(7), ms.float32)
    with pytest.raises(ValueError, match="broadcast"):
        stack(Tensor(np.ones((4, 3)), ms.float32))
    assert not any(hasattr(layer, "cell_init_args") for layer in stack.layers)


def losses(folder, monkeypatch, switch: str, target: str | list[str], share: float = 0.0) -> list[float]:
    config = LoraConfig(target_modules=target, r=4, init_lora_weights=False, lora_dropout=share)
    return losses_of(config, folder, monkeypatch, switch, share)


def losses_of(config: PeftConfig, folder, monkeypatch, switch: str, share: float = 0.0) -> list[float]:
    monkeypatch.setenv(SWITCH, switch)
    ms.set_seed(3)
    dropout = {"attention_dropout": share} if share else {}  # GPT-2 has another name for it
    model = AutoModelForCausalLM.from_pretrained(folder, **dropout)
    model = get_peft_model(model, config)
    seed_dropout(model, 5)
    optimizer = AdamW(model)
    texts = make_texts()
    columns = {**texts, "labels": labels_of(texts)}
    step = TrainStep(model.set_train(), tuple(columns), optimizer, max_grad_norm=1.0)
    found = []
    for number in range(1, 6):
        scalars = optimizer.scalars(number, 1e-2)
        tensors = map(Tensor, columns.values())
        found.append(float(step(Tensor(True), Tensor(1.0, ms.float32), *scalars, *tensors)[0].asnumpy()))
    return found


@pytest.mark.parametrize(
    ("name", "target"),
    [
        ("llama", "all-linear"),
        ("qwen2", "all-linear"),  # two kinds of layers: with a window and without
        pytest.param("gpt2", "all-linear", marks=pytest.mark.slow),
        ("llama", ["0.self_attn.q_proj", "2.self_attn.q_proj"]),
    ],
)
def test_training_is_the_same_bit_for_bit(name, target, tmp_path, monkeypatch):
    layers = {"n_layer": 4} if name == "gpt2" else {"num_hidden_layers": 4}
    make_decoder(name, tmp_path, **layers)
    assert losses(tmp_path, monkeypatch, "1", target) == losses(tmp_path, monkeypatch, "0", target)


@pytest.mark.parametrize("kernels", default(["1", "0"], "1"))
def test_training_with_dropout_is_the_same_bit_for_bit(kernels, tmp_path, monkeypatch):
    monkeypatch.setattr("mindpeft.ops.dropout.kernels_on", lambda: kernels == "1")
    make_decoder("llama", tmp_path, num_hidden_layers=4)
    found = losses(tmp_path, monkeypatch, "1", "all-linear", share=0.2)
    assert found == losses(tmp_path, monkeypatch, "0", "all-linear", share=0.2)
    assert found != losses(tmp_path, monkeypatch, "1", "all-linear")


OTHERS = {
    # Its layers know the cell at the bottom of those around which they are.
    "DoRA": lambda: LoraConfig(target_modules="all-linear", r=4, init_lora_weights=False, use_dora=True),
    "OFT": lambda: OFTConfig(target_modules="all-linear", oft_block_size=4),
    # Its layers know what stands around the model, and which part of it is theirs.
    "prefix tuning": lambda: PrefixTuningConfig(num_virtual_tokens=3),
    "with an MLP": lambda: PrefixTuningConfig(num_virtual_tokens=3, prefix_projection=True),
}


@pytest.mark.parametrize("method", default(OTHERS, "DoRA", "prefix tuning"))
def test_training_by_other_methods_is_the_same_bit_for_bit(method, tmp_path, monkeypatch):
    make_decoder("llama", tmp_path, num_hidden_layers=4)
    found = [losses_of(OTHERS[method](), tmp_path, monkeypatch, switch) for switch in "10"]
    assert found[0] == found[1]
    assert found[0][0] > found[0][-1]


@pytest.mark.parametrize("share", [0.0, 0.1])
def test_layers_with_dropout_are_equal(share, tmp_path):
    make_decoder("llama", tmp_path, num_hidden_layers=3)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, attention_dropout=share)
    seed_dropout(model, 5)
    assert len({structure(layer) for layer in model.model.layers}) == 1


def test_layers_with_dropout_draw_numbers_of_their_own():
    """Of four layers in one graph each keeps other numbers, and the gradient is that of the same ones."""
    layers = Stack(*(dropout(0.2) for _ in range(4))).set_train()
    assert len({structure(layer) for layer in layers.layers}) == 1
    kept = Differentiated(layers)
    x = Tensor(np.ones((256, 256)), ms.float32)
    for _ in range(2):
        out, gradient = (value.asnumpy() for value in kept(x))
        assert (out > 0).mean() == pytest.approx(0.8**4, abs=0.02)
        np.testing.assert_array_equal(out, gradient)


@pytest.mark.parametrize(("method", "kinds"), [(name, 3 if name == "with an MLP" else 1) for name in OTHERS])
def test_parameters_alone_differ_between_equal_layers_with_adapters(method, kinds, tmp_path):
    make_decoder("llama", tmp_path, num_hidden_layers=3)
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    get_peft_model(model, OTHERS[method]())
    assert len({structure(layer) for layer in model.model.layers}) == kinds


def test_adapters_are_children_of_the_layers(tmp_path):
    make_decoder("llama", tmp_path, num_hidden_layers=2)
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    get_peft_model(model, LoraConfig(target_modules="all-linear"))
    assert isinstance(model.model.layers[0].mlp.up_proj.lora_A.weight, Parameter)
