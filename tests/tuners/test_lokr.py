"""LoKr against torch + peft on twin models."""

from __future__ import annotations

import numpy as np
import pytest
from peft.tuners.lokr.layer import factorization

from mindpeft import get_peft_model
from mindpeft.errors import InputError
from mindpeft.tuners.lokr import LoKrConfig, split
from tests.tuners import against_peft as check

pytestmark = pytest.mark.usefixtures("graph_mode")

LOKR = check.Method("LoKrConfig", {"init_weights": False})
WIDE = ["intermediate", "dense", "query"]
OPTIONS = {
    "default_targets_whole": {},
    "thin_right": {"target_modules": WIDE, "decompose_factor": 2, "r": 3, "alpha": 5},
    "thin_both": {"target_modules": WIDE, "decompose_both": True, "r": 1, "alpha": 0.5},
    "odd_factor": {"target_modules": WIDE, "decompose_factor": 3, "r": 2, "alpha": 1},
    "patterns": {
        "target_modules": ["query", "value"],
        "r": 1,
        "alpha": 1,
        "rank_pattern": {"query": 4},
        "alpha_pattern": {"encoder.layer.0.attention.self.query": 5},
        "task_type": "SEQ_CLS",
    },
}


@check.each_option(OPTIONS)
def test_reads_what_peft_wrote(mode, twins, tmp_path, name):
    check.check_reading(twins, tmp_path, LOKR, **OPTIONS[name])


@pytest.mark.parametrize("name", ["thin_both", "patterns"])
def test_peft_reads_what_we_wrote(twins, tmp_path, name):
    check.check_writing(twins, tmp_path, LOKR, **OPTIONS[name])


@pytest.mark.parametrize("name", ["thin_right", "thin_both"])
def test_pynative_gives_the_same(twins, tmp_path, name):
    check.check_pynative(twins, tmp_path, LOKR, **OPTIONS[name])


@pytest.mark.parametrize("init", [True, False, "lycoris"])
@pytest.mark.parametrize("name", ["default_targets_whole", "thin_both"])
def test_initial_values(twins, name, init):
    check.check_initial_values(twins, LOKR, **{**OPTIONS[name], "init_weights": init})


@pytest.mark.parametrize("init", [True, "lycoris"])
def test_a_fresh_adapter_changes_nothing(twins, init):
    model = get_peft_model(twins.make_model(), LoKrConfig(init_weights=init))
    np.testing.assert_array_equal(twins.logits(model), check.base_logits(twins))


def test_switching(twins):
    """Between forms of one split in one slot, and other splits in slots of their own."""
    forms = ({"r": 1, "decompose_both": True}, {"r": 1}, {"r": 8}, {"r": 2, "decompose_factor": 2})
    check.check_switching(twins, LOKR, *({"target_modules": ["dense"], **form} for form in forms))
    model = LOKR.here(twins, target_modules=["query"], **forms[0])
    for name, form in zip("abc", forms[1:], strict=True):
        model.add_adapter(name, LOKR.ours(target_modules=["query"], **form))
        model.set_adapter(name)
    slots = [name for name, _ in model.base_model.parameters_and_names() if name.endswith("scaling")]
    assert len(slots) == 2 * twins.LAYERS


@pytest.mark.parametrize("factor", [-1, 1, 2, 5, 8, 64])
def test_split_is_pefts_factorization(factor):
    for dimension in (1, 7, 12, 16, 24, 90, 127, 128, 250, 360, 768, 1000, 3072):
        assert split(dimension, factor) == factorization(dimension, factor)


def test_half_precision_base_keeps_a_float32_adapter():
    check.check_half_precision(LoKrConfig(target_modules=["0"], r=1, init_weights=False))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"r": 0}, "r must be a positive integer, not 0"),
        ({"alpha": None}, "alpha must be a number, not None"),
        ({"decompose_factor": 0}, "decompose_factor must be -1 or a positive integer, not 0"),
        ({"decompose_factor": 2.0}, "decompose_factor must be -1 or a positive integer, not 2.0"),
        ({"init_weights": "lycori"}, "init_weights must be one of .*did you mean 'lycoris'"),
        ({"rank_dropout": "0.1"}, r"rank_dropout must lie in \[0, 1\)"),
        ({"target_modules": "query", "layers_to_transform": 1}, "layers_to_transform can't be used when"),
        ({"target_modules": ["LayerNorm"]}, "LoKr can't wrap the cell 'LayerNorm'"),
        ({"target_modules": ["c_attn"]}, "of class Conv1D; supported: linear cells with .out, in. weights"),
    ],
)
def test_mistakes(twins, options, message):
    with pytest.raises(InputError, match=message):
        get_peft_model(twins.make_model(), LoKrConfig(**options))
