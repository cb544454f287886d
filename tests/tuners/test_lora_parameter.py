"""LoRA on plain parameters against PEFT: single matrices, and one for each expert, in both layouts."""

from __future__ import annotations

import json
from types import SimpleNamespace

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
from tests.tuners.against_peft import LABELS, check_files, loss_and_gradients, randomise, weights_of

WIDTH, INNER, EXPERTS, VOCABULARY, CLASSES = 6, 5, 3, 11, 3
IDS = np.random.default_rng(1).integers(0, VOCABULARY, (4, 5)).astype(np.int32)
SHAPES = {"up": (EXPERTS, INNER, WIDTH), "down": (EXPERTS, WIDTH, INNER)}


class TorchExperts(torch.nn.Module):
    def __init__(self, transposed: bool) -> None:
        super().__init__()
        self.is_transposed = transposed
        for name, (experts, out, inside) in SHAPES.items():
            shape = (experts, inside, out) if transposed else (experts, out, inside)
            setattr(self, name, torch.nn.Parameter(torch.zeros(shape)))

    def forward(self, x: torch.Tensor, shares: torch.Tensor) -> torch.Tensor:
        up, down = (w if self.is_transposed else w.transpose(1, 2) for w in (self.up, self.down))
        return (torch.sigmoid(x[:, None] @ up) @ down * shares[:, :, None, None]).sum(1)


class TorchMix(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.matrix = torch.nn.Parameter(torch.zeros(EXPERTS, WIDTH))
        self.gain = torch.nn.Parameter(torch.zeros(EXPERTS))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.softmax(torch.nn.functional.linear(x.mean(1), self.matrix) + self.gain, -1)


class TorchModel(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.words, self.router = torch.nn.Embedding(VOCABULARY, WIDTH), TorchMix()
        self.experts, self.older = TorchExperts(False), TorchExperts(True)
        self.classifier = torch.nn.Linear(WIDTH, CLASSES)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.words(ids)
        shares = self.router(x)
        x = x + self.experts(x, shares)
        x = x + self.older(x, shares=shares)
        return self.classifier(x.mean(1))


class Experts(nn.Cell):
    def __init__(self, transposed: bool) -> None:
        super().__init__()
        self.is_transposed = transposed
        up, down = (
            (experts, inside, out) if transposed else (experts, out, inside)
            for experts, out, inside in SHAPES.values()
        )
        self.up = ms.Parameter(Tensor(np.zeros(up, np.float32)), name="up")
        self.down = ms.Parameter(Tensor(np.zeros(down, np.float32)), name="down")

    def construct(self, x: Tensor, shares: Tensor) -> Tensor:
        up, down = self.up, self.down
        if not self.is_transposed:
            up, down = ops.transpose(up, (0, 2, 1)), ops.transpose(down, (0, 2, 1))
        found = ops.matmul(ops.sigmoid(ops.matmul(ops.expand_dims(x, 1), up)), down)
        return (found * ops.reshape(shares, (x.shape[0], -1, 1, 1))).sum(1)


class Mix(nn.Cell):
    def __init__(self) -> None:
        super().__init__()
        self.matrix = ms.Parameter(Tensor(np.zeros((EXPERTS, WIDTH), np.float32)), name="matrix")
        self.gain = ms.Parameter(Tensor(np.zeros(EXPERTS, np.float32)), name="gain")

    def construct(self, x: Tensor) -> Tensor:
        return ops.softmax(ops.matmul(x.mean(1), ops.transpose(self.matrix, (1, 0))) + self.gain, -1)


class Model(nn.Cell):
    def __init__(self) -> None:
        super().__init__()
        self.config = SimpleNamespace(name_or_path="experts/tiny")
        self.words, self.router = nn.Embedding(VOCABULARY, WIDTH), Mix()
        self.experts, self.older = Experts(False), Experts(True)
        self.classifier = nn.Dense(WIDTH, CLASSES)

    def construct(self, ids: Tensor, labels: Tensor | None = None):
        x = self.words(ids)
        shares = self.router(x)
        x = x + self.experts(x, shares)
        x = x + self.older(x, shares=shares)
        logits = self.classifier(x.mean(1))
        return logits if labels is None else (ops.cross_entropy(logits, labels), logits)


def make_model() -> Model:
    model, random = Model(), np.random.default_rng(0)
    for place in base_places(model).values():
        place.write(random.normal(0, 0.6, place.parameter.shape).astype(np.float32))
    return model


def make_torch() -> TorchModel:
    model = TorchModel()
    model.load_state_dict(
        {key: torch.tensor(place.read()) for key, place in base_places(make_model()).items()}
    )
    return model.eval()


ALL = {"target_modules": [], "target_parameters": ["up", "experts.down", "older.down", "router.matrix"]}
CASES = {
    "all": {**ALL, "r": 2, "lora_alpha": 3},
    "patterns": {
        **ALL,
        "r": 3,
        "use_rslora": True,
        "rank_pattern": {"experts.up": 1, "matrix": 2},
        "alpha_pattern": {"older.down": 5},
    },
    "with_cells": {
        "target_modules": ["words"],
        "target_parameters": ["older.up", "classifier.weight"],
        "r": 2,
    },
    "saved_head": {**ALL, "target_parameters": ["experts.down"], "modules_to_save": ["classifier"]},
    "table": {"target_modules": [], "target_parameters": ["words.weight"], "r": 2, "bias": "lora_only"},
}


def in_peft(folder=None, noise: float = 0.1, **options) -> peft.PeftModel:
    torch.manual_seed(3)
    model = peft.PeftModel(make_torch(), peft.LoraConfig(**options))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * noise)
    if folder is not None:
        model.save_pretrained(folder)
    return model.eval()


def here(**options) -> PeftModel:
    ms.set_seed(4)
    model = get_peft_model(make_model(), LoraConfig(**options))
    randomise(model, 0.1)
    return model


def logits(model) -> np.ndarray:
    return model(Tensor(IDS)).asnumpy()


def torch_logits(model) -> np.ndarray:
    return model(torch.tensor(IDS)).detach().numpy()


@pytest.fixture(autouse=True)
def graph_mode():
    ms.set_context(mode=ms.GRAPH_MODE)
    yield
    ms.set_context(mode=ms.GRAPH_MODE)


@pytest.mark.parametrize("name", CASES)
def test_an_adapter_of_pefts(tmp_path, name):
    """Logits, numbers, gradients, the file written again, switched off, merged."""
    theirs = in_peft(tmp_path / "theirs", **CASES[name])
    expected = torch_logits(theirs)
    assert np.abs(expected - torch_logits(make_torch())).max() > 1e-2
    ours = PeftModel.from_pretrained(make_model(), tmp_path / "theirs", is_trainable=True)
    np.testing.assert_allclose(logits(ours), expected, atol=1e-5)
    assert ours.get_nb_trainable_parameters() == theirs.get_nb_trainable_parameters()
    check_gradients(ours, theirs)
    ours.save_pretrained(tmp_path / "ours")
    check_files(tmp_path / "ours", tmp_path / "theirs")
    with ours.disable_adapter():
        np.testing.assert_array_equal(logits(ours), logits(make_model()))
    before = weights_of(ours)
    for _ in range(5):
        ours.merge_adapter(safe_merge=True)
        ours.unmerge_adapter()
    for key, value in weights_of(ours).items():
        np.testing.assert_array_equal(value, before[key], err_msg=key)
    bare, state = ours.merge_and_unload(), theirs.merge_and_unload().state_dict()
    assert type(bare.experts) is Experts
    np.testing.assert_allclose(logits(bare), expected, atol=1e-5)
    for key, place in base_places(bare).items():
        np.testing.assert_allclose(place.read(), state[key].numpy(), atol=1e-6, err_msg=key)


def test_without_a_graph(tmp_path):
    expected = torch_logits(in_peft(tmp_path, **CASES["all"]))
    ms.set_context(mode=ms.PYNATIVE_MODE)
    ours = PeftModel.from_pretrained(make_model(), tmp_path)
    np.testing.assert_allclose(logits(ours), expected, atol=1e-5)
    with ours.disable_adapter():
        np.testing.assert_array_equal(logits(ours), logits(make_model()))


def check_gradients(ours: PeftModel, theirs: peft.PeftModel) -> None:
    """Loss and gradients are PEFT's, those of experts put in the file's order."""
    loss = torch.nn.functional.cross_entropy(theirs(torch.tensor(IDS)), torch.tensor(LABELS))
    loss.backward()
    expected = {
        key.removeprefix("base_model.model.").replace(".default", "").replace(".modules_to_save", ""): p.grad
        for key, p in theirs.named_parameters()
        if p.grad is not None
    }
    mine = ours.trainable_params()
    value, found = loss_and_gradients(ours, mine)(Tensor(IDS), Tensor(LABELS, ms.int32))
    assert float(value) == pytest.approx(loss.item(), rel=1e-5)
    gradients = {parameter.name: g.asnumpy() for parameter, g in zip(mine, found, strict=True)}
    for slot in ours._bank.rack:
        for name, layout in getattr(slot, "layout_of", {}).items():
            gradients[slot.slot(name).name] = layout.to_file(name, gradients[slot.slot(name).name])
    assert gradients.keys() == expected.keys()
    for key, value in expected.items():
        limit = 1e-4 * value.abs().max().item() + 1e-7
        np.testing.assert_allclose(gradients[key], value.numpy(), atol=limit, err_msg=key)


def test_an_adapter_of_ours(tmp_path):
    ours = here(**CASES["patterns"])
    ours.save_pretrained(tmp_path)
    theirs = peft.PeftModel.from_pretrained(make_torch(), tmp_path)
    np.testing.assert_allclose(torch_logits(theirs.eval()), logits(ours), atol=1e-5)


@pytest.mark.parametrize("kind", [True, False, "gaussian"])
def test_initial_values(kind):
    """As large as PEFT's, over all parameters of a kind."""
    ms.set_seed(0)
    options = {**ALL, "r": 16, "init_lora_weights": kind}
    ours = get_peft_model(make_model(), LoraConfig(**options))
    expected = peft.get_peft_model_state_dict(in_peft(noise=0.0, **options))
    found = ours._bank.export("default")[0][1]
    assert {key: value.shape for key, value in found.items()} == {
        k: tuple(v.shape) for k, v in expected.items()
    }
    for key, value in found.items():
        other, spread = expected[key].numpy(), 4 / np.sqrt(value.size)
        assert value.std() == pytest.approx(other.std(), rel=spread, abs=1e-7), key
        assert np.abs(value).max() == pytest.approx(np.abs(other).max(), rel=0.3 + spread, abs=1e-7), key


def test_adapters_in_turn_and_together():
    """Of several ranks in one slot, together in two slots; switching compiles nothing."""
    ours, answers = here(**CASES["patterns"]), {}
    for name, options in {"second": {**ALL, "r": 2}, "third": {**ALL, "r": 1, "lora_alpha": 0.5}}.items():
        ours.add_adapter(name, LoraConfig(**options))
        ours.set_adapter(name)
        randomise(ours, 0.2)
    for name in ours.peft_config:
        ours.set_adapter(name)
        answers[name] = logits(ours)
    compiled = len(ours.compile_cache)
    for name, expected in answers.items():
        ours.set_adapter(name)
        np.testing.assert_array_equal(logits(ours), expected)
    assert len(ours.compile_cache) == compiled == 1
    np.testing.assert_allclose(answers["default"], logits(here(**CASES["patterns"])), atol=1e-6)
    ours.set_adapter(["second", "third"])
    both = logits(ours)
    ours.merge_adapter()
    np.testing.assert_allclose(logits(ours), both, atol=1e-5)
    ours.unmerge_adapter()
    np.testing.assert_array_equal(logits(ours.unload()), logits(make_model()))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lora_dropout": 0.1}, "lora_dropout=0.1 is not possible with target_parameters"),
        ({"lora_bias": True}, "lora_bias=True is not possible"),
        ({"use_dora": True}, "use_dora=True is not possible"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights='pissa' is not possible with target_parameters"),
        ({"target_parameters": "up"}, "target_parameters must be a list of names"),
        ({"target_parameters": ["gain"]}, r"'router.gain' is \(3,\), and must have 2 or 3 axes"),
        (
            {"target_parameters": ["experts.upp"]},
            "no parameter is called 'experts.upp'; did you mean 'experts.up'?",
        ),
        (
            {"target_modules": ["classifier"], "target_parameters": ["classifier.weight"]},
            "the cell of 'classifier.weight' is a target of target_modules",
        ),
        (
            {"target_parameters": ["classifier.weight"], "modules_to_save": ["classifier"]},
            "the cell of 'classifier.weight' is saved whole",
        ),
    ],
)
def test_refuses(options, message):
    base = make_model()
    with pytest.raises(InputError, match=message):
        get_peft_model(base, LoraConfig(**{**ALL, **options}))
    assert type(base.experts) is Experts


def test_a_name_that_is_idle_is_told(caplog):
    get_peft_model(make_model(), LoraConfig(**{**ALL, "target_parameters": ["up", "router.matrx"]}))
    assert "no parameter is called 'router.matrx'; did you mean 'router.matrix'?" in caplog.text
    get_peft_model(make_model(), LoraConfig(target_modules=["classifier"], target_parameters=["upp"]))
    assert "no parameter is called 'upp'; did you mean 'up'?" in caplog.text


def test_a_parameter_of_the_model_itself():
    with pytest.raises(InputError, match="'matrix' belongs to the whole model"):
        get_peft_model(Mix(), LoraConfig(target_modules=[], target_parameters=["matrix"]))


def test_another_adapter_of_the_cell_is_refused():
    ours = here(target_modules=[], target_parameters=["classifier.weight"])
    with pytest.raises(InputError, match="'classifier' has parameters that another adapter"):
        ours.add_adapter("second", LoraConfig(target_modules=["classifier"]))
    assert list(ours.peft_config) == ["default"]


def test_files_that_do_not_fit(tmp_path):
    """A file of two parameters of a cell for a config that means one."""
    here(**CASES["all"]).save_pretrained(tmp_path)
    path = tmp_path / "adapter_config.json"
    config = json.loads(path.read_text())
    assert config["target_parameters"] == ALL["target_parameters"]
    path.write_text(json.dumps({**config, "target_parameters": ["down"]}))
    with pytest.raises(InputError, match=r"has no place for: 'experts\.lora_A"):
        PeftModel.from_pretrained(make_model(), tmp_path)
    assert "base_model.model.experts.base_layer.lora_A.weight" in load_file(
        tmp_path / "adapter_model.safetensors"
    )


def test_a_file_from_before_the_axes_were_swapped(tmp_path):
    here(**CASES["all"]).save_pretrained(tmp_path)
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "peft_version": "0.18.1"}))
    with pytest.raises(InputError, match=r"PEFT 0.18.1 took 'experts.up' for \(experts, in, out\)"):
        PeftModel.from_pretrained(make_model(), tmp_path)
