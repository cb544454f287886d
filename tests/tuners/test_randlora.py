"""RandLoRA against torch + peft on twin models."""

from __future__ import annotations

import mindspore as ms
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from mindpeft import PeftModel, get_peft_model
from mindpeft.errors import InputError
from mindpeft.tuners.randlora import RandLoraConfig
from tests.tuners import against_peft as check

pytestmark = pytest.mark.usefixtures("graph_mode")

RANDLORA = check.Method("RandLoraConfig", {"r": 3, "randlora_alpha": 6}, noise=0.05)
OPTIONS = {
    "widths_differ": {"target_modules": ["intermediate", "output.dense", "query"], "r": 5},
    "conv1d": {"target_modules": ["c_attn"], "sparse": True},
    "bias": {"target_modules": ["query", "intermediate"], "bias": "randlora_only", "task_type": "SEQ_CLS"},
    "layers": {"target_modules": ["dense"], "layers_to_transform": [1], "very_sparse": True},
}


@check.each_option(OPTIONS)
def test_reads_what_peft_wrote(mode, twins, tmp_path, name):
    check.check_reading(twins, tmp_path, RANDLORA, **OPTIONS[name])


def test_peft_reads_what_we_wrote(twins, tmp_path):
    check.check_writing(twins, tmp_path, RANDLORA, **OPTIONS["widths_differ"])


def test_pynative_gives_the_same(twins, tmp_path):
    check.check_pynative(twins, tmp_path, RANDLORA, **OPTIONS["widths_differ"])


@pytest.mark.parametrize("init", [True, False])
def test_initial_values(twins, init):
    options = {**OPTIONS["widths_differ"], "init_weights": init, "r": 1}
    check.check_initial_values(twins, RANDLORA, **options)


def test_switching(twins):
    check.check_switching(twins, RANDLORA, {}, OPTIONS["widths_differ"], {"r": 2})


@pytest.mark.parametrize(
    ("options", "filled"), [({}, 1.0), ({"sparse": True}, 1 / 3), ({"very_sparse": True}, 1 / 4)]
)
def test_bases_have_unit_spread_and_are_decided_by_their_key(twins, tmp_path, options, filled):
    drawn = []
    for key in (0, 0, 1):
        folder = tmp_path / str(len(drawn))
        ms.set_seed(len(drawn))
        config = RandLoraConfig(
            target_modules=["query", "intermediate"], r=64, projection_prng_key=key, **options
        )
        get_peft_model(twins.make_model(), config).save_pretrained(folder)
        drawn.append(load_file(folder / "adapter_model.safetensors"))
    first, second = (drawn[0][f"base_model.randlora_{name}"] for name in "AB")
    assert (first.shape, second.shape) == ((64, 1, twins.WIDTH), (twins.INNER, 1, 64))
    for matrix in (first, second):
        assert matrix.std() == pytest.approx(1, abs=1e-3)
        assert np.mean(matrix != 0) == pytest.approx(filled, abs=0.04)
        assert len(np.unique(np.abs(matrix))) > 2 or filled < 1
    np.testing.assert_array_equal(first, drawn[1]["base_model.randlora_A"])
    assert (first != drawn[2]["base_model.randlora_A"]).any()


def test_dropout_acts_while_training_only(twins):
    model = RANDLORA.here(twins, randlora_dropout=0.5)
    plain = RANDLORA.here(twins)
    np.testing.assert_array_equal(twins.logits(model), twins.logits(plain))
    model.set_train(True)
    assert not np.array_equal(twins.logits(model), twins.logits(plain))


def test_a_file_without_bases_is_refused(twins, tmp_path):
    RANDLORA.in_peft(twins, tmp_path, save_projection=False)
    with pytest.raises(InputError, match="without randlora_A and randlora_B in the file"):
        PeftModel.from_pretrained(twins.make_model(), tmp_path)


def test_copies_that_differ_are_refused(twins, tmp_path):
    RANDLORA.in_peft(twins, tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    tensors = load_file(path)
    name = next(name for name in tensors if name.endswith("query.randlora_B"))
    save_file({**tensors, name: tensors[name] + 1}, path)
    with pytest.raises(
        InputError, match=r"query\.randlora_B' must be a copy of 'randlora_B', and it differs"
    ):
        PeftModel.from_pretrained(twins.make_model(), tmp_path)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"r": 0}, "r must be a positive integer, not 0"),
        ({"randlora_alpha": "a"}, "randlora_alpha must be a number"),
        ({"projection_prng_key": -1}, "projection_prng_key must be an integer, 0 or more"),
        ({"randlora_dropout": 1.0}, r"randlora_dropout must lie in \[0, 1\)"),
        ({"bias": "lora_only"}, "bias must be one of none, all, randlora_only"),
        ({"sparse": 1}, "sparse must be true or false"),
        ({"target_modules": ["words"]}, "RandLoRA can't wrap the cell 'words' of class Embedding"),
    ],
)
def test_mistakes(twins, options, message):
    with pytest.raises(InputError, match=message):
        get_peft_model(twins.make_model(), RandLoraConfig(**options))
