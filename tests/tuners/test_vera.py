"""VeRA against torch + peft on twin models."""

from __future__ import annotations

import json

import mindspore as ms
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from mindpeft import PeftModel, get_peft_model
from mindpeft.errors import InputError
from mindpeft.tuners.vera import VeraConfig
from tests.tuners import against_peft as check

pytestmark = pytest.mark.usefixtures("graph_mode")

VERA = check.Method("VeraConfig", {"r": 12}, noise=0.1)
OPTIONS = {
    "default_targets": {"d_initial": 0.3},
    "widths_differ": {"target_modules": ["intermediate", "dense", "query"], "projection_prng_key": 5},
    "conv1d": {"target_modules": ["c_attn"]},
    "bias_all": {"target_modules": ["query", "intermediate"], "bias": "all", "task_type": "SEQ_CLS"},
    "bias_vera_only": {"target_modules": ["query", "intermediate"], "bias": "vera_only"},
    "layers": {"target_modules": ["dense"], "layers_to_transform": [1], "layers_pattern": "layer"},
}


@check.each_option(OPTIONS)
def test_reads_what_peft_wrote(mode, twins, tmp_path, name):
    check.check_reading(twins, tmp_path, VERA, **OPTIONS[name])


@pytest.mark.parametrize("name", ["widths_differ", "bias_all"])
def test_peft_reads_what_we_wrote(twins, tmp_path, name):
    check.check_writing(twins, tmp_path, VERA, **OPTIONS[name])


@pytest.mark.parametrize("name", ["widths_differ", "conv1d"])
def test_pynative_gives_the_same(twins, tmp_path, name):
    check.check_pynative(twins, tmp_path, VERA, **OPTIONS[name])


@pytest.mark.parametrize("init", [True, False])
def test_initial_values(twins, init):
    check.check_initial_values(twins, VERA, **{**OPTIONS["widths_differ"], "init_weights": init, "r": 64})


def test_switching(twins):
    check.check_switching(twins, VERA, OPTIONS["default_targets"], OPTIONS["widths_differ"], {"r": 3})


def test_projections_are_he_uniform_and_decided_by_their_key(twins, tmp_path):
    drawn = []
    for key in (0, 0, 1):
        folder = tmp_path / str(len(drawn))
        ms.set_seed(len(drawn))
        options = {"target_modules": ["query", "intermediate"], "r": 100, "projection_prng_key": key}
        get_peft_model(twins.make_model(), VeraConfig(**options)).save_pretrained(folder)
        drawn.append(load_file(folder / "adapter_model.safetensors"))
    first, second = (drawn[0][f"base_model.vera_{name}"] for name in "AB")
    assert first.shape == (100, twins.WIDTH)
    assert second.shape == (twins.INNER, 100)
    for matrix in (first, second):
        assert np.abs(matrix).max() == pytest.approx(np.sqrt(6 / matrix.shape[1]), rel=0.02)
        assert matrix.std() == pytest.approx(np.sqrt(2 / matrix.shape[1]), rel=0.05)
    np.testing.assert_array_equal(first, drawn[1]["base_model.vera_A"])
    assert (first != drawn[2]["base_model.vera_A"]).all()


def test_dropout_acts_while_training_only(twins):
    model = VERA.here(twins, vera_dropout=0.5)
    plain = VERA.here(twins)
    np.testing.assert_array_equal(twins.logits(model), twins.logits(plain))
    model.set_train(True)
    assert not np.array_equal(twins.logits(model), twins.logits(plain))
    assert not np.array_equal(twins.logits(model), twins.logits(model))


def test_half_precision_base_keeps_a_float32_adapter():
    check.check_half_precision(VeraConfig(target_modules=["0"], r=4, init_weights=False))


def test_a_file_without_projections_is_refused(twins, tmp_path):
    VERA.in_peft(twins, tmp_path, save_projection=False)
    with pytest.raises(InputError, match="without vera_A and vera_B in the file they would have"):
        PeftModel.from_pretrained(twins.make_model(), tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps({**config, "save_projection": True}))
    with pytest.raises(InputError, match="tensors missing from the file: 'vera_A', 'vera_B'"):
        PeftModel.from_pretrained(twins.make_model(), tmp_path)


def test_projections_of_another_width_are_refused(twins, tmp_path):
    VERA.in_peft(twins, tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    tensors = load_file(path)
    save_file({**tensors, "base_model.vera_A": tensors["base_model.vera_A"][:, 1:].copy()}, path)
    with pytest.raises(InputError, match=r"'vera_A' is \(12, 15\) in the file and \(12, 16\) in the model"):
        PeftModel.from_pretrained(twins.make_model(), tmp_path)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"r": 0}, "r must be a positive integer, not 0"),
        ({"r": 2.5}, "r must be a positive integer, not 2.5"),
        ({"projection_prng_key": -1}, "projection_prng_key must be an integer, 0 or more"),
        ({"vera_dropout": 1.0}, r"vera_dropout must lie in \[0, 1\)"),
        ({"d_initial": "0.1"}, "d_initial must be a number"),
        ({"bias": "vera"}, "bias must be one of none, all, vera_only, not 'vera'; did you mean 'vera_only'"),
        ({"bias": "lora_only"}, "bias must be one of none, all, vera_only"),
        ({"layers_pattern": "layer"}, "layers_pattern needs layers_to_transform"),
        ({"save_projection": False}, "save_projection=False is not supported"),
        ({"target_modules": ["words"]}, "VeRA can't wrap the cell 'words' of class Embedding"),
    ],
)
def test_mistakes(twins, options, message):
    with pytest.raises(InputError, match=message):
        get_peft_model(twins.make_model(), VeraConfig(**options))
