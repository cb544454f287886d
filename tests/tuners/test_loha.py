"""LoHa against torch + peft on twin models."""

from __future__ import annotations

import pytest

from mindpeft import get_peft_model
from mindpeft.errors import InputError
from mindpeft.tuners.loha import LoHaConfig
from tests.tuners import against_peft as check

pytestmark = pytest.mark.usefixtures("graph_mode")

LOHA = check.Method("LoHaConfig", {"init_weights": False})
OPTIONS = {
    "default_targets": {},
    "thin": {"target_modules": ["intermediate", "dense"], "r": 2, "alpha": 3},  # D is never made
    "patterns": {
        "target_modules": ["query", "value"],
        "r": 3,
        "rank_pattern": {"query": 2, r"layer\.1\..*value": 6},
        "alpha_pattern": {"encoder.layer.0.attention.self.query": 5},
        "exclude_modules": ["layer.2.attention.self.query"],
    },
    "seq_cls": {
        "target_modules": ["key"],
        "layers_to_transform": [0, 2],
        "layers_pattern": "layer",
        "task_type": "SEQ_CLS",
    },
}


@check.each_option(OPTIONS)
def test_reads_what_peft_wrote(mode, twins, tmp_path, name):
    check.check_reading(twins, tmp_path, LOHA, **OPTIONS[name])


def test_peft_reads_what_we_wrote(twins, tmp_path):
    check.check_writing(twins, tmp_path, LOHA, **OPTIONS["patterns"])


@pytest.mark.parametrize("name", ["default_targets", "thin"])
def test_pynative_gives_the_same(twins, tmp_path, name):
    check.check_pynative(twins, tmp_path, LOHA, **OPTIONS[name])


@pytest.mark.parametrize("init", [True, False])
def test_initial_values(twins, init):
    check.check_initial_values(twins, LOHA, **{**OPTIONS["thin"], "init_weights": init})


def test_switching(twins):
    check.check_switching(twins, LOHA, OPTIONS["default_targets"], OPTIONS["patterns"], OPTIONS["thin"])


def test_half_precision_base_keeps_a_float32_adapter():
    check.check_half_precision(LoHaConfig(target_modules=["0"], r=4, init_weights=False))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"r": 0}, "r must be a positive integer, not 0"),
        ({"rank_pattern": {"query": -1}}, r"rank_pattern\['query'\] must be a positive integer, not -1"),
        ({"alpha": "8"}, "alpha must be a number, not '8'"),
        ({"alpha_pattern": {"query": None}}, r"alpha_pattern\['query'\] must be a number, not None"),
        ({"rank_dropout": 1}, r"rank_dropout must lie in \[0, 1\), not 1"),
        ({"module_dropout": -0.1}, r"module_dropout must lie in \[0, 1\), not -0.1"),
        ({"init_weights": "lycoris"}, "init_weights must be true or false, not 'lycoris'"),
        ({"layers_pattern": "layer"}, "layers_pattern needs layers_to_transform"),
        ({"target_modules": ["words"]}, "LoHa can't wrap the cell 'words' of class Embedding"),
        ({"target_modules": ["c_attn"]}, "of class Conv1D; supported: linear cells with .out, in. weights"),
    ],
)
def test_mistakes(twins, options, message):
    with pytest.raises(InputError, match=message):
        get_peft_model(twins.make_model(), LoHaConfig(**options))
