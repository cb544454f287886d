"""BEFT against torch + peft on twin models."""

from __future__ import annotations

import mindspore as ms
import numpy as np
import peft.utils.constants as theirs
import pytest
from mindspore import Tensor, nn

from mindpeft import PeftModel, get_peft_model
from mindpeft.errors import InputError
from mindpeft.tuners.beft import BeftConfig
from tests.tuners import against_peft as check

pytestmark = pytest.mark.usefixtures("graph_mode")

BEFT = check.Method("BeftConfig", noise=0.2)
OPTIONS = {
    "default_targets": {},
    "random": {"target_modules": ["dense", "key"], "init_weights": False, "task_type": "SEQ_CLS"},
    "regex": {"target_modules": r".*layer\.[02]\..*\.dense", "modules_to_save": ["c_attn"]},
}


@check.each_option(OPTIONS)
def test_reads_what_peft_wrote(mode, twins, tmp_path, name):
    check.check_reading(twins, tmp_path, BEFT, **OPTIONS[name])


def test_peft_reads_what_we_wrote(twins, tmp_path):
    check.check_writing(twins, tmp_path, BEFT, **OPTIONS["random"])


def test_pynative_gives_the_same(twins, tmp_path):
    check.check_pynative(twins, tmp_path, BEFT, **OPTIONS["random"])


@pytest.mark.parametrize("init", [True, False])
def test_initial_values(twins, init):
    check.check_initial_values(twins, BEFT, init_weights=init)


def test_switching(twins):
    check.check_switching(twins, BEFT, OPTIONS["default_targets"], OPTIONS["random"])


def test_cells_without_a_bias_work_but_cant_be_merged(twins, tmp_path):
    theirs = BEFT.in_peft(twins, tmp_path, target_modules=["intermediate", "query"])
    ours = PeftModel.from_pretrained(twins.make_model(), tmp_path)
    np.testing.assert_allclose(twins.logits(ours), twins.torch_logits(theirs), atol=1e-5)
    with pytest.raises(
        InputError, match=r"BEFT can't be merged into 'encoder.*intermediate', which has no bias"
    ):
        ours.merge_adapter()
    np.testing.assert_allclose(twins.logits(ours), twins.torch_logits(theirs), atol=1e-5)


def test_default_targets_are_pefts():
    assert BeftConfig.DEFAULT_TARGETS == theirs.TRANSFORMERS_MODELS_TO_BEFT_TARGET_MODULES_MAPPING


def test_half_precision_base_keeps_a_float32_adapter():
    cell = nn.SequentialCell(nn.Dense(8, 8, dtype=ms.float16))
    model = get_peft_model(cell, BeftConfig(target_modules=["0"], init_weights=False))
    (vector,) = model.trainable_params()
    assert vector.dtype == ms.float32
    x = Tensor(np.random.default_rng(0).normal(size=(3, 8)).astype(np.float16))
    with model.disable_adapter():
        plain = model(x).asnumpy()
    y = model(x)
    assert y.dtype == ms.float16
    np.testing.assert_allclose(y.asnumpy(), plain + vector.asnumpy(), atol=2e-3)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"target_modules": ["valu"]}, "no cell matches target_modules valu.*did you mean 'value'"),
        ({"target_modules": 1}, "target_modules must be a list of names or a regular expression"),
        ({"target_modules": ["words"]}, "BEFT can't wrap the cell 'words' of class Embedding"),
        ({"target_modules": ["LayerNorm"]}, "BEFT can't wrap the cell 'LayerNorm'"),
        ({"target_modules": ["c_attn"]}, "BEFT can't wrap the cell 'c_attn' of class Conv1D"),
        ({"modules_to_save": [1]}, "modules_to_save must be a list of names"),
        ({"init_weights": "zero"}, "init_weights must be true or false, not 'zero'"),
        ({"task_type": "SEQCLS"}, "unknown task_type 'SEQCLS'; did you mean 'SEQ_CLS'"),
    ],
)
def test_mistakes(twins, options, message):
    with pytest.raises(InputError, match=message):
        get_peft_model(twins.make_model(), BeftConfig(**options))
