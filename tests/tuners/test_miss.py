"""MiSS against torch + peft on twin models."""

from __future__ import annotations

import numpy as np
import pytest

from mindpeft import get_peft_model
from mindpeft.errors import InputError
from mindpeft.tuners.miss import MissConfig
from tests.tuners import against_peft as check

pytestmark = pytest.mark.usefixtures("graph_mode")

MISS = check.Method("MissConfig", {"r": 4})
OPTIONS = {
    "default_targets": {},
    "random": {"target_modules": ["dense", "intermediate"], "init_weights": False, "task_type": "SEQ_CLS"},
    "uneven": {"target_modules": ["dense"], "r": 5, "bias": "MiSS_only"},
    "mini": {"target_modules": ["dense", "intermediate"], "init_weights": "mini", "mini_r": 2, "r": 3},
    "bat": {"target_modules": ["dense", "query"], "init_weights": "bat", "bias": "all"},
    "layers": {
        "target_modules": ["dense"],
        "layers_to_transform": [1],
        "exclude_modules": ["attention.output.dense"],
    },
}


@check.each_option(OPTIONS)
def test_reads_what_peft_wrote(mode, twins, tmp_path, name):
    check.check_reading(twins, tmp_path, MISS, **OPTIONS[name])


@pytest.mark.parametrize("name", ["mini", "bat"])
def test_peft_reads_what_we_wrote(twins, tmp_path, name):
    check.check_writing(twins, tmp_path, MISS, **OPTIONS[name])


@pytest.mark.parametrize("name", ["uneven", "bat"])
def test_pynative_gives_the_same(twins, tmp_path, name):
    check.check_pynative(twins, tmp_path, MISS, **OPTIONS[name])


@pytest.mark.parametrize("init", [True, False, "bat", "mini"])
def test_initial_values(twins, init):
    check.check_initial_values(twins, MISS, init_weights=init)


def test_switching(twins):
    check.check_switching(
        twins, MISS, *({**OPTIONS[name], "bias": "none"} for name in ("random", "uneven", "bat"))
    )


def test_dropout_acts_while_training_only(twins):
    model = MISS.here(twins, miss_dropout=0.5)
    plain = MISS.here(twins)
    np.testing.assert_array_equal(twins.logits(model), twins.logits(plain))
    model.set_train(True)
    assert not np.array_equal(twins.logits(model), twins.logits(plain))
    assert not np.array_equal(twins.logits(model), twins.logits(model))


@pytest.mark.parametrize("init", [False, "bat"])
def test_half_precision_base_keeps_a_float32_adapter(init):
    check.check_half_precision(MissConfig(target_modules=["0"], init_weights=init, r=4))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "r=64 is more than the input's width of '.*query', which is 16"),
        ({"r": 0}, "r must be a positive integer, not 0"),
        ({"r": 4, "mini_r": 0}, "mini_r must be a positive integer, not 0"),
        ({"r": 4, "mini_r": 3, "init_weights": "mini"}, "mini_r=3 does not divide the output's width"),
        ({"r": 3, "init_weights": "bat"}, '"bat" needs an r that divides both widths of .*, 16 and 16'),
        ({"r": 4, "init_weights": "bad"}, "init_weights must be one of .*did you mean 'bat'"),
        ({"r": 4, "miss_dropout": 1}, r"miss_dropout must lie in \[0, 1\)"),
        ({"r": 4, "bias": "miss_only"}, "bias must be one of none, all, MiSS_only"),
        ({"r": 4, "target_modules": ["c_attn"]}, "MiSS can't wrap the cell 'c_attn' of class Conv1D"),
    ],
)
def test_mistakes(twins, options, message):
    with pytest.raises(InputError, match=message):
        get_peft_model(twins.make_model(), MissConfig(**options))
