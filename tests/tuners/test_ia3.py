"""(IA)3 against torch + peft on twin models."""

from __future__ import annotations

import mindspore as ms
import numpy as np
import peft.utils.constants as theirs
import pytest
from mindspore import Tensor

from mindpeft import get_peft_model
from mindpeft.errors import InputError
from mindpeft.tuners.ia3 import IA3_FEEDFORWARD, IA3_TARGETS, IA3Config
from tests.tuners import against_peft as check

pytestmark = pytest.mark.usefixtures("graph_mode")

IA3 = check.Method("IA3Config", {"init_ia3_weights": True}, noise=0.3)
OPTIONS = {
    "default_targets": {},
    "outputs": {"target_modules": ["query", "intermediate"], "feedforward_modules": []},
    "inputs": {"target_modules": ["intermediate", "dense"], "feedforward_modules": ["intermediate", "dense"]},
    "regex": {"target_modules": r".*\.(key|dense)", "feedforward_modules": r"encoder\.layer\.[01]\..*dense"},
    "conv1d": {"target_modules": ["c_attn"], "feedforward_modules": []},
    "conv1d_input": {"target_modules": ["c_attn"], "feedforward_modules": ["c_attn"]},
    "seq_cls": {
        "target_modules": ["query", "attention.output.dense"],
        "feedforward_modules": ["attention.output.dense"],
        "exclude_modules": ["layer.1.attention.self.query"],
        "task_type": "SEQ_CLS",
    },
}


@check.each_option(OPTIONS)
def test_reads_what_peft_wrote(mode, twins, tmp_path, name):
    check.check_reading(twins, tmp_path, IA3, **OPTIONS[name])


@pytest.mark.parametrize("name", ["default_targets", "conv1d_input"])
def test_peft_reads_what_we_wrote(twins, tmp_path, name):
    check.check_writing(twins, tmp_path, IA3, **OPTIONS[name])


@pytest.mark.parametrize("name", ["regex", "conv1d"])
def test_pynative_gives_the_same(twins, tmp_path, name):
    check.check_pynative(twins, tmp_path, IA3, **OPTIONS[name])


def test_initial_values(twins):
    check.check_initial_values(twins, IA3, **OPTIONS["inputs"])
    check.check_initial_values(twins, IA3, **{**OPTIONS["inputs"], "init_ia3_weights": False})


def test_switching(twins):
    check.check_switching(twins, IA3, OPTIONS["outputs"], OPTIONS["regex"], OPTIONS["inputs"])


def test_default_targets_are_pefts():
    assert IA3_TARGETS.keys() == theirs.TRANSFORMERS_MODELS_TO_IA3_TARGET_MODULES_MAPPING.keys()
    for model, names in theirs.TRANSFORMERS_MODELS_TO_IA3_TARGET_MODULES_MAPPING.items():
        assert sorted(IA3_TARGETS[model]) == sorted(names)
    assert IA3_FEEDFORWARD == theirs.TRANSFORMERS_MODELS_TO_IA3_FEEDFORWARD_MODULES_MAPPING


def test_half_precision_base_keeps_a_float32_adapter():
    cell = ms.nn.SequentialCell(ms.nn.Dense(8, 8, dtype=ms.float16))
    model = get_peft_model(
        cell, IA3Config(target_modules=["0"], feedforward_modules=[], init_ia3_weights=False)
    )
    (factors,) = model.trainable_params()
    assert factors.dtype == ms.float32
    x = Tensor(np.random.default_rng(0).normal(size=(3, 8)).astype(np.float16))
    with model.disable_adapter():
        plain = model(x).asnumpy()
    y = model(x)
    assert y.dtype == ms.float16
    np.testing.assert_allclose(y.asnumpy(), plain * factors.asnumpy()[:, 0], atol=2e-3)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"target_modules": ["query"], "feedforward_modules": ["dense"]},
            "feedforward_modules must be among target_modules; not there: dense",
        ),
        (
            {"target_modules": ["query"], "feedforward_modules": 3},
            "feedforward_modules must be a list of names",
        ),
        ({"target_modules": 3}, "target_modules must be a list of names"),
        ({"target_modules": ["quary"], "feedforward_modules": []}, "did you mean 'query'"),
        ({"target_modules": ["words"], "feedforward_modules": []}, r"\(IA\)3 can't wrap the cell 'words'"),
        (
            {"target_modules": ["LayerNorm"], "feedforward_modules": []},
            r"of class LayerNorm; supported: linear",
        ),
        (
            {"target_modules": ["query"], "feedforward_modules": [], "task_type": "SEQ"},
            "unknown task_type 'SEQ'",
        ),
        ({"target_modules": "[", "feedforward_modules": []}, "is not a regular expression"),
        ({"exclude_modules": 1}, "exclude_modules must be a list of names"),
    ],
)
def test_mistakes(twins, options, message):
    with pytest.raises(InputError, match=message):
        get_peft_model(twins.make_model(), IA3Config(**options))


def test_unknown_model_types_need_targets(twins):
    model = twins.make_model()
    model.config.model_type = "other"
    with pytest.raises(InputError, match="target_modules is not set and there is no default"):
        get_peft_model(model, IA3Config())
    with pytest.raises(InputError, match="feedforward_modules is not set and there is no default"):
        get_peft_model(model, IA3Config(target_modules=["query"]))
