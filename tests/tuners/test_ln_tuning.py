"""LN tuning against torch + peft on twin models."""

from __future__ import annotations

import json

import mindspore as ms
import numpy as np
import peft
import pytest
import torch
from mindspore import Tensor, nn
from safetensors.numpy import load_file

from mindpeft import LNTuningConfig, PeftModel, get_peft_model
from mindpeft.errors import InputError
from mindpeft.nn import LayerNorm
from mindpeft.train.optim import undecayed_names
from mindpeft.tuners.ln_tuning import LN_TARGETS
from tests.tuners.oracle import assert_gradients_equal, curve, gradients, shift, torch_curve, torch_gradients

pytestmark = pytest.mark.usefixtures("pynative")

OPTIONS = {
    "plain": {"target_modules": ["LayerNorm"]},
    "regex": {"target_modules": r"encoder\.layer\.[02]\..*LayerNorm"},
    "exclude": {"target_modules": ["LayerNorm"], "exclude_modules": ["attention.output.LayerNorm"]},
    "head": {"target_modules": ["output.LayerNorm"], "modules_to_save": ["classifier"]},
}


def torch_peft(twins, options, folder=None):
    torch.manual_seed(3)
    model = peft.PeftModel(twins.make_torch(), peft.LNTuningConfig(**options))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    if folder is not None:
        model.save_pretrained(folder)
    return model.eval()


def plain(name):
    name = name.removeprefix("base_model.model.").replace(".modules_to_save.default.", ".")
    return name.replace(".default", "")


@pytest.mark.parametrize("name", OPTIONS)
def test_equals_peft_both_ways(twins, tmp_path, name):
    options = OPTIONS[name]
    theirs = torch_peft(twins, options, tmp_path / "theirs")
    ours = PeftModel.from_pretrained(twins.make_model(), tmp_path / "theirs", is_trainable=True)
    np.testing.assert_allclose(twins.logits(ours), twins.torch_logits(theirs), atol=1e-5)
    assert ours.get_nb_trainable_parameters() == theirs.get_nb_trainable_parameters()
    _, expected = torch_gradients(theirs, twins.IDS)
    assert_gradients_equal(gradients(ours, twins.IDS)[1], {plain(key): g for key, g in expected.items()})

    fresh = get_peft_model(twins.make_model(), LNTuningConfig(**options))
    np.testing.assert_array_equal(twins.logits(fresh), twins.logits(twins.make_model()))
    shift(fresh)
    fresh.save_pretrained(tmp_path / "ours")
    again = peft.PeftModel(twins.make_torch(), peft.PeftConfig.from_pretrained(tmp_path / "ours"))
    again.load_adapter(tmp_path / "ours", "default")
    np.testing.assert_allclose(twins.torch_logits(again.eval()), twins.logits(fresh), atol=1e-5)
    files = [load_file(tmp_path / side / "adapter_model.safetensors") for side in ("ours", "theirs")]
    assert {k: v.shape for k, v in files[0].items()} == {k: v.shape for k, v in files[1].items()}
    configs = [json.loads((tmp_path / s / "adapter_config.json").read_text()) for s in ("ours", "theirs")]
    assert configs[0].keys() == configs[1].keys()
    assert configs[0]["peft_type"] == configs[1]["peft_type"]


def test_twenty_steps_equal_pefts(twins, tmp_path):
    theirs = torch_peft(twins, OPTIONS["head"], tmp_path)
    ours = PeftModel.from_pretrained(twins.make_model(), tmp_path, is_trainable=True)
    ms.set_context(mode=ms.GRAPH_MODE)
    found, expected = curve(ours, twins.IDS, 20), torch_curve(theirs, twins.IDS, 20)
    np.testing.assert_allclose(found, expected, atol=1e-4)
    assert expected[-1] < expected[0] - 0.1


def test_switching_disabling_and_merging_in_a_graph(twins):
    ms.set_context(mode=ms.GRAPH_MODE)
    base = twins.logits(twins.make_model())
    model = get_peft_model(twins.make_model(), LNTuningConfig(target_modules=["LayerNorm"]), "one")
    model.add_adapter("two", LNTuningConfig(target_modules=["attention.output.LayerNorm"]))
    expected = {}
    for name in ("one", "two"):
        model.set_adapter(name)
        shift(model, seed=len(expected))
        expected[name] = twins.logits(model)
    assert np.abs(expected["one"] - expected["two"]).max() > 1e-3
    before = len(model.compile_cache)
    for name in ("one", "two"):
        model.set_adapter(name)
        np.testing.assert_array_equal(twins.logits(model), expected[name])
        for _ in range(20):
            model.merge_adapter()
            model.unmerge_adapter()
        np.testing.assert_array_equal(twins.logits(model), expected[name])
        model.merge_adapter()
        np.testing.assert_array_equal(twins.logits(model), expected[name])
        with model.disable_adapter():
            np.testing.assert_array_equal(twins.logits(model), base)
        model.unmerge_adapter()
    assert len(model.compile_cache) == before
    np.testing.assert_array_equal(twins.logits(model.merge_and_unload()), expected["two"])


def test_our_own_norm_is_computed_once(tmp_path):
    x = np.random.default_rng(0).normal(size=(3, 8)).astype(np.float32)

    def cell(dtype=ms.float32):
        norm = LayerNorm(8, 1e-6, dtype)
        norm.weight.set_data(Tensor(np.linspace(0.5, 1.5, 8), dtype))
        return nn.SequentialCell(norm)

    def expected(weight, bias):
        return (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-6) * weight + bias

    model = get_peft_model(cell(), LNTuningConfig(target_modules=["0"]), "one")
    assert model.get_base_model()[0].chooses_weights
    assert undecayed_names(model) >= {"base_model.0.ln_tuning_layers.weight"}
    weight, bias = (np.random.default_rng(i).normal(size=8).astype(np.float32) for i in (1, 2))
    for parameter in model.trainable_params():
        parameter.set_data(Tensor(weight if parameter.name.endswith("weight") else bias))
    for mode in (ms.PYNATIVE_MODE, ms.GRAPH_MODE):
        ms.set_context(mode=mode)
        np.testing.assert_allclose(model(Tensor(x)).asnumpy(), expected(weight, bias), atol=1e-5)
        with model.disable_adapter():
            np.testing.assert_array_equal(model(Tensor(x)).asnumpy(), cell()(Tensor(x)).asnumpy())
    half = get_peft_model(cell(ms.float16), LNTuningConfig(target_modules=["0"]))
    assert {str(p.dtype) for p in half.trainable_params()} == {"Float32"}
    found = half(Tensor(x.astype(np.float16)))
    assert found.dtype == ms.float16
    np.testing.assert_allclose(found.asnumpy(), expected(np.linspace(0.5, 1.5, 8), 0), atol=1e-2)


def test_default_targets_are_pefts():
    assert LN_TARGETS == peft.utils.TRANSFORMERS_MODELS_TO_LNTUNING_TARGET_MODULES_MAPPING


class Odd(nn.Cell):
    def __init__(self):
        super().__init__()
        self.dense, self.batch, self.relu = nn.Dense(2, 2), nn.BatchNorm1d(2), nn.ReLU()
        self.GroupNorms = nn.SequentialCell(nn.LayerNorm((2,)))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"target_modules": ["dense"]},
            "LN tuning can't wrap the cell 'dense' of class Dense; supported: norm",
        ),
        ({"target_modules": ["batch"]}, "LN tuning can't wrap the cell 'batch' of class BatchNorm1d"),
        ({"target_modules": ["relu"]}, "LN tuning can't wrap the cell 'relu'"),
        ({"target_modules": ["GroupNorms"]}, "LN tuning can't wrap the cell 'GroupNorms'"),
        ({}, "no default for model_type None"),
        ({"target_modules": ["nothing"]}, "no cell matches target_modules nothing"),
        ({"target_modules": 3}, "target_modules must be a list"),
        ({"target_modules": ["0"], "exclude_modules": {"GroupNorms.0"}}, "no cell matches"),
        (
            {"target_modules": ["dense"], "modules_to_save": "dense"},
            "modules_to_save must be a list of names",
        ),
    ],
)
def test_refuses(options, message):
    with pytest.raises(InputError, match=message):
        get_peft_model(Odd(), LNTuningConfig(**options))
