"""What is compiled: switching adapters compiles nothing, and no frozen weight has a gradient in the graph."""

from __future__ import annotations

import re
from collections import Counter

import mindspore as ms
import numpy as np
import pytest
import transformers
from mindspore.nn import cell as cell_module

from mindpeft import LoraConfig, PeftModel, get_peft_model
from mindpeft.ops.cpu import kernels_on
from mindpeft.train.optim import AdamW
from mindpeft.train.runner import StepRunner
from tests.models import reference
from tests.models.reference import make_batch, make_reference, open_ours, run_ours, run_theirs
from tests.parity.adapters import make_peft_model

pytestmark = pytest.mark.usefixtures("graph_mode")

LABELS = np.array([0, 3, 2], np.int32)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny")
    make_reference("sequence", folder, num_labels=4)
    return folder


def graphs_held() -> int:
    """The graphs that MindSpore holds for all cells of this process."""
    return sum(len(graphs) for graphs in cell_module.cells_compile_cache.values())


def test_switching_a_hundred_times_compiles_nothing(tiny, tmp_path):
    batch, expected = make_batch(), {}
    for seed, rank in enumerate((4, 8, 16)):
        base = transformers.AutoModelForSequenceClassification.from_pretrained(
            tiny, attn_implementation="eager"
        )
        options = {
            "r": rank,
            "lora_alpha": 3 * rank,
            "target_modules": ["query", "value"],
            "task_type": "SEQ_CLS",
        }
        theirs = make_peft_model(base.eval(), options, seed=seed)
        theirs.save_pretrained(tmp_path / f"rank{rank}")
        expected[f"rank{rank}"] = run_theirs(theirs, **batch).logits
    ours = PeftModel.from_pretrained(open_ours("sequence", tiny), tmp_path / "rank4", "rank4")
    for name in ("rank8", "rank16"):
        ours.load_adapter(tmp_path / name, name)

    first = {}
    for name in expected:
        ours.set_adapter(name)
        first[name] = run_ours(ours, **batch).asnumpy()
        assert reference.absolute_error(first[name], expected[name]) <= 1e-5
    held = graphs_held()
    assert held == 1

    order = np.random.default_rng(0).choice(list(expected), 100)
    assert set(order) == set(expected)
    for name in order:
        ours.set_adapter(str(name))
        np.testing.assert_array_equal(run_ours(ours, **batch).asnumpy(), first[name])
    with ours.disable_adapter():
        bare = run_ours(ours, **batch)
    assert graphs_held() == held
    assert reference.absolute_error(bare, run_ours(open_ours("sequence", tiny), **batch)) == 0


def test_an_adapter_alone_and_in_a_wider_slot_give_the_same(tiny):
    ms.set_seed(0)
    options = {"r": 4, "target_modules": ["query", "value"], "init_lora_weights": False}
    alone = get_peft_model(open_ours("sequence", tiny), LoraConfig(**options))
    ms.set_seed(0)
    wide = get_peft_model(open_ours("sequence", tiny), LoraConfig(**options), slot_rank=16)
    found, expected = run_ours(wide, **make_batch()), run_ours(alone, **make_batch())
    # Sums of 16 products, 12 of them zero, may round in another order than sums of 4.
    assert reference.absolute_error(found, expected) <= 2e-6


@pytest.fixture
def count_products(training_graph):
    """A function that trains one step and counts the matrix products in the graph compiled for it."""

    def count(model) -> tuple[int, int]:
        text = training_graph(model)
        return tuple(
            len(re.findall(rf"= (?:PrimFunc_)?{name}\(", text)) for name in ("MatMul", "BatchMatMul")
        )

    return count


@pytest.fixture
def training_graph(tmp_path):
    """A function that trains one step and returns the text of the graph compiled for it."""

    def train(model) -> str:
        folder = tmp_path / str(id(model))
        ms.set_context(save_graphs=1, save_graphs_path=str(folder))
        try:
            runner = StepRunner(model, AdamW(model))
            runner.train({**make_batch(), "labels": LABELS}, 1, 1e-3)
        finally:
            ms.set_context(save_graphs=0)
        (path,) = folder.rglob("*_validate_*.ir")
        return path.read_text()

    return train


def products_of_query_value_lora(layers: int) -> tuple[int, int]:
    """The matrix products of a step that trains LoRA on query and value, and the head: what theory asks for.

    Forward: six linear cells in each layer (query, key, value, two outputs, intermediate), A and B on two of
    them, pooler and classifier; two batched products in each layer (scores, mix).

    Backward, with W frozen, a linear cell needs one product (for its input) and not two. The head is trained:
    two. A LoRA pair needs four: for B, for A's output, for A, and for A's input. Nothing before the first
    layer's A is trained, so in that layer the products for the inputs of query, key, value and of both A fall
    away, and so does the gradient of the keys: one of the four batched products.
    """
    forward = layers * (6 + 2 * 2) + 2
    full_layer = 6 + 2 * 4
    first_layer = 3 + 2 * 3
    backward = (layers - 1) * full_layer + first_layer + 1 + 2
    return forward + backward, layers * 2 + layers * 4 - 1


@pytest.mark.usefixtures("plain_operators")
@pytest.mark.parametrize("layers", [1, pytest.param(3, marks=pytest.mark.slow)])
def test_no_gradient_of_a_frozen_weight(tmp_path, count_products, layers):
    make_reference("sequence", tmp_path, num_labels=4, num_hidden_layers=layers)
    config = LoraConfig(r=4, target_modules=["query", "value"], task_type="SEQ_CLS")
    model = get_peft_model(open_ours("sequence", tmp_path), config)
    assert count_products(model) == products_of_query_value_lora(layers)


@pytest.mark.usefixtures("plain_operators")
def test_each_thawed_weight_adds_its_product(tmp_path, count_products):
    """The counter sees gradients of weights: training one more matrix adds exactly one product."""
    make_reference("sequence", tmp_path, num_labels=4, num_hidden_layers=1)
    config = LoraConfig(r=4, target_modules=["query", "value"], task_type="SEQ_CLS")
    model = get_peft_model(open_ours("sequence", tmp_path), config)
    thawed = ("output.dense.weight", "intermediate.dense.weight", "pooler.dense.weight")
    for name, parameter in model.parameters_and_names():
        parameter.requires_grad |= name.endswith(thawed)
    products, batched = products_of_query_value_lora(1)
    assert count_products(model) == (products + 4, batched)  # two cells are called output.dense


@pytest.mark.skipif(not kernels_on(), reason="no kernels were built here")
def test_kernels_compute_no_gradient_of_a_frozen_weight(tmp_path, training_graph):
    """Of two layers: LoRA on query and value, a trained classifier, all else frozen."""
    make_reference("sequence", tmp_path, num_labels=4, num_hidden_layers=2)
    config = LoraConfig(r=4, target_modules=["query", "value"], task_type="SEQ_CLS")
    text = training_graph(get_peft_model(open_ours("sequence", tmp_path), config))
    found = Counter(re.findall(r'func_name: "[^"]*:(\w+)"', text))
    wanted = {
        "lora_linear_bias": 4,
        "lora_linear_grad": 2,  # nobody wants the gradient of the first layer's input
        "lora_linear_grad_pair": 4,
        "linear_bias": 2 * 4 + 2,  # key, two outputs, intermediate; pooler and classifier
        "linear_grad": 4 + 3 + 2,  # nothing is trained before the first layer's key
        "linear_grad_weight": 1,  # the classifier's
        "sum_rows": 1,
    }
    assert {name: found[name] for name in wanted} == wanted
