"""LoRA on convolutions against torch + peft on a small net with equal weights."""

from __future__ import annotations

import mindspore as ms
import numpy as np
import peft
import pytest
import torch
from mindspore import Tensor, nn, ops
from safetensors.numpy import load_file

from mindpeft import LoraConfig, PeftModel, get_peft_model
from mindpeft.errors import InputError
from mindpeft.parameters import base_places
from tests.tuners.against_peft import check_files, file_name, randomise

pytestmark = pytest.mark.usefixtures("graph_mode")

X = np.random.default_rng(3).normal(size=(2, 4, 9, 10)).astype(np.float32)


class TorchNet(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.wide = torch.nn.Conv2d(4, 6, (3, 2), stride=(2, 1), padding=1)
        self.grouped = torch.nn.Conv2d(6, 8, 3, groups=2, padding=1, bias=False)
        self.point = torch.nn.Conv2d(8, 5, 1)
        self.line = torch.nn.Conv1d(5, 7, 3, stride=2, padding=2)
        self.head = torch.nn.Linear(7, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.point(torch.tanh(self.grouped(torch.tanh(self.wide(x)))))
        return self.head(torch.tanh(self.line(x.mean(2))).mean(2))


class Net(nn.Cell):
    def __init__(self) -> None:
        super().__init__()
        self.wide = nn.Conv2d(4, 6, (3, 2), (2, 1), "pad", 1, has_bias=True)
        self.grouped = nn.Conv2d(6, 8, 3, 1, "same", group=2)
        self.point = nn.Conv2d(8, 5, 1, pad_mode="valid", has_bias=True)
        self.line = nn.Conv1d(5, 7, 3, 2, "pad", 2, has_bias=True)
        self.head = nn.Dense(7, 3)

    def construct(self, x: Tensor, labels: Tensor | None = None):
        x = self.point(ops.tanh(self.grouped(ops.tanh(self.wide(x)))))
        logits = self.head(ops.tanh(self.line(x.mean(2))).mean(2))
        return logits if labels is None else (ops.cross_entropy(logits, labels), logits)


def make_torch():
    torch.manual_seed(0)
    return TorchNet().eval()


def make_net():
    net, state = Net(), make_torch().state_dict()
    for name, place in base_places(net).items():
        place.write(state[name].numpy().reshape(place.parameter.shape))
    return net


OPTIONS = {
    "plain": {"target_modules": ["wide", "point", "line"], "r": 3, "bias": "lora_only"},
    "grouped": {"target_modules": ["wide", "grouped"], "r": 4, "rank_pattern": {"wide": 2}},
    "lora_bias": {"target_modules": ["wide", "line", "head"], "use_rslora": True, "lora_bias": True},
}


def in_peft(name, folder):
    torch.manual_seed(2)
    model = peft.PeftModel(make_torch(), peft.LoraConfig(init_lora_weights=False, **OPTIONS[name])).eval()
    model.save_pretrained(folder)
    return model


def answer(model):
    return model(Tensor(X)).asnumpy()


def answer_of_torch(model):
    return model(torch.tensor(X)).detach().numpy()


@pytest.mark.parametrize("name", OPTIONS)
def test_reading(tmp_path, name):
    theirs = in_peft(name, tmp_path / "theirs")
    ours = PeftModel.from_pretrained(make_net(), tmp_path / "theirs", is_trainable=True)
    expected = answer_of_torch(theirs.get_base_model())
    assert np.abs(expected - answer_of_torch(make_torch())).max() > 0.01
    np.testing.assert_allclose(answer(ours), expected, atol=1e-5)
    assert ours.get_nb_trainable_parameters() == theirs.get_nb_trainable_parameters()
    check_gradients(ours, theirs)
    ours.save_pretrained(tmp_path / "ours")
    check_files(tmp_path / "ours", tmp_path / "theirs")
    with ours.disable_adapter():
        np.testing.assert_array_equal(answer(ours), answer(make_net()))
    ms.set_context(mode=ms.PYNATIVE_MODE)
    np.testing.assert_allclose(answer(ours), expected, atol=1e-5)


def check_gradients(ours, theirs):
    logits = theirs.get_base_model()(torch.tensor(X))
    torch.nn.functional.cross_entropy(logits, torch.tensor([0, 2])).backward()
    expected = {
        key.removeprefix("base_model.model.").replace(".base_layer.", ".").replace(".default", ""): value.grad
        for key, value in theirs.named_parameters()
        if value.requires_grad
    }
    parameters = {file_name(parameter): parameter for parameter in ours.trainable_params()}
    assert parameters.keys() == expected.keys()

    def loss(x, labels):
        return ours(x, labels)[0]

    gradient = ms.value_and_grad(loss, None, list(parameters.values()))
    for key, found in zip(parameters, gradient(Tensor(X), Tensor([0, 2], ms.int32))[1], strict=True):
        wanted = expected[key].numpy()
        np.testing.assert_allclose(found.asnumpy(), wanted, atol=1e-4 * np.abs(wanted).max(), err_msg=key)


@pytest.mark.parametrize("name", OPTIONS)
def test_writing(tmp_path, name):
    ms.set_seed(1)
    ours = get_peft_model(
        make_net(), LoraConfig(init_lora_weights="gaussian" if name == "plain" else True, **OPTIONS[name])
    )
    np.testing.assert_array_equal(answer(ours), answer(make_net()))
    randomise(ours)
    ours.save_pretrained(tmp_path)
    theirs = peft.PeftModel(make_torch(), peft.PeftConfig.from_pretrained(tmp_path))
    theirs.load_adapter(tmp_path, "default")
    np.testing.assert_allclose(answer_of_torch(theirs.eval().get_base_model()), answer(ours), atol=1e-5)


@pytest.mark.parametrize("name", ["plain", "lora_bias"])
def test_merging(tmp_path, name):
    theirs = in_peft(name, tmp_path)
    ours = PeftModel.from_pretrained(make_net(), tmp_path)
    expected, before = answer(ours), ours.base_model.wide.base_layer.weight.asnumpy().copy()
    for _ in range(20):
        ours.merge_adapter()
        ours.unmerge_adapter()
    np.testing.assert_array_equal(ours.base_model.wide.base_layer.weight.asnumpy(), before)
    merged, state = ours.merge_and_unload(), theirs.merge_and_unload().state_dict()
    np.testing.assert_allclose(answer(merged), expected, atol=1e-5)
    for key, place in base_places(merged).items():
        wanted = state[key].numpy().reshape(place.parameter.shape)
        np.testing.assert_allclose(place.read(), wanted, atol=1e-6, err_msg=key)


def test_switching_compiles_nothing_and_groups_get_their_own_slot():
    ms.set_seed(4)
    model = get_peft_model(make_net(), LoraConfig(target_modules=["wide", "line"], r=2), slot_rank=5)
    model.add_adapter("larger", LoraConfig(target_modules=["wide", "line"], r=5, init_lora_weights=False))
    answers = {}
    for name in ("default", "larger"):
        model.set_adapter(name)
        answers[name] = answer(model)
    for name in ("default", "larger"):
        model.set_adapter(name)
        np.testing.assert_array_equal(answer(model), answers[name])
    assert len(model.compile_cache) == 1
    np.testing.assert_array_equal(answers["default"], answer(make_net()))

    ms.set_seed(4)
    options = {"target_modules": ["grouped"], "init_lora_weights": False}
    grouped = get_peft_model(make_net(), LoraConfig(r=2, **options))
    alone = answer(grouped)
    grouped.add_adapter("larger", LoraConfig(r=6, **options))
    np.testing.assert_allclose(answer(grouped), alone, atol=1e-6)


@pytest.mark.parametrize("kind", [True, False, "gaussian"])
def test_initial_values_are_distributed_as_pefts(tmp_path, kind):
    ms.set_seed(0)
    torch.manual_seed(0)
    options = {"target_modules": ["wide"], "r": 60, "init_lora_weights": kind}
    get_peft_model(make_net(), LoraConfig(**options)).save_pretrained(tmp_path / "ours")
    peft.PeftModel(make_torch(), peft.LoraConfig(**options)).save_pretrained(tmp_path / "theirs")
    ours, theirs = (load_file(tmp_path / side / "adapter_model.safetensors") for side in ("ours", "theirs"))
    for key, value in theirs.items():
        assert ours[key].shape == value.shape
        assert ours[key].std() == pytest.approx(value.std(), rel=0.15), key
        assert np.abs(ours[key]).max() == pytest.approx(np.abs(value).max(), rel=0.4), key


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"target_modules": ["grouped"], "r": 3},
            "the rank 3 of 'grouped' must be divisible by its 2 groups",
        ),
        (
            {"target_modules": ["wide"], "use_dora": True},
            "use_dora is not supported for the convolution 'wide'",
        ),
        ({"target_modules": ["line"], "init_lora_weights": "pissa"}, "'pissa' is not possible for the conv"),
        ({"target_modules": ["line"], "init_lora_weights": "orthogonal"}, "'orthogonal' is not possible"),
    ],
)
def test_refuses(options, message):
    with pytest.raises(InputError, match=message):
        get_peft_model(make_net(), LoraConfig(**options))


def test_refuses_dilation_other_convolutions_and_merging_groups():
    dilated = nn.SequentialCell(nn.Conv2d(2, 2, 3, dilation=2))
    with pytest.raises(InputError, match="PEFT's has no dilation"):
        get_peft_model(dilated, LoraConfig(target_modules=["0"]))
    with pytest.raises(InputError, match="can't wrap the cell '0' of class Conv3d"):
        get_peft_model(nn.SequentialCell(nn.Conv3d(2, 2, 3)), LoraConfig(target_modules=["0"]))
    model = get_peft_model(make_net(), LoraConfig(target_modules=["grouped"]))
    with pytest.raises(InputError, match="'grouped' with 2 groups can't be merged"):
        model.merge_adapter()
