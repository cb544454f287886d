"""GraLoRA against torch + peft on twin models."""

from __future__ import annotations

import mindspore as ms
import numpy as np
import pytest
from mindspore import Tensor, nn

from mindpeft import get_peft_model
from mindpeft.errors import InputError
from mindpeft.tuners.gralora import GraloraConfig
from tests.tuners import against_peft as check

pytestmark = pytest.mark.usefixtures("graph_mode")

GRALORA = check.Method("GraloraConfig", {"init_weights": False, "r": 4, "alpha": 6})
OPTIONS = {
    "default_targets": {"bias": "gralora_only", "gralora_k": 4},
    "hybrid": {
        "target_modules": ["dense", "intermediate"],
        "hybrid_r": 3,
        "r": 6,
        "task_type": "SEQ_CLS",
    },
    "conv1d": {"target_modules": ["c_attn"]},
}


@check.each_option(OPTIONS)
def test_reads_what_peft_wrote(mode, twins, tmp_path, name):
    check.check_reading(twins, tmp_path, GRALORA, **OPTIONS[name])


def test_peft_reads_what_we_wrote(twins, tmp_path):
    check.check_writing(twins, tmp_path, GRALORA, **OPTIONS["hybrid"])


def test_pynative_gives_the_same(twins, tmp_path):
    check.check_pynative(twins, tmp_path, GRALORA, **OPTIONS["hybrid"])


@pytest.mark.parametrize("init", [True, False])
def test_initial_values(twins, init):
    options = {"target_modules": ["intermediate", "query"], "hybrid_r": 3, "init_weights": init}
    check.check_initial_values(twins, GRALORA, **options)


def test_switching(twins):
    check.check_switching(twins, GRALORA, OPTIONS["default_targets"], OPTIONS["hybrid"], {"r": 2})


def test_dropout_acts_while_training_only(twins):
    model = GRALORA.here(twins, gralora_dropout=0.5)
    plain = GRALORA.here(twins)
    np.testing.assert_array_equal(twins.logits(model), twins.logits(plain))
    model.set_train(True)
    assert not np.array_equal(twins.logits(model), twins.logits(plain))


def test_half_precision_base_keeps_a_float32_adapter():
    cell = nn.SequentialCell(nn.Dense(8, 8, dtype=ms.float16))
    model = get_peft_model(cell, GRALORA.ours(target_modules=["0"]))
    assert {str(p.dtype) for p in model.trainable_params()} == {"Float32"}
    x = Tensor(np.random.default_rng(0).normal(size=(3, 8)).astype(np.float16))
    y = model(x)
    assert y.dtype == ms.float16
    model.merge_adapter()
    np.testing.assert_allclose(y.asnumpy(), model(x).asnumpy(), atol=3e-2)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"r": 0}, "r must be a positive integer, not 0"),
        ({"r": 3}, "r=3 must be a multiple of gralora_k=2"),
        ({"hybrid_r": -1}, "hybrid_r must be an integer, 0 or more"),
        ({"gralora_k": 3, "r": 3}, "gralora_k=3 does not divide both widths of .*, 16 and 16"),
        ({"alpha": "1"}, "alpha must be a number"),
        ({"gralora_dropout": 1.0}, r"gralora_dropout must lie in \[0, 1\)"),
        ({"bias": "lora_only"}, "bias must be one of none, all, gralora_only"),
        ({"target_modules": ["words"]}, "GraLoRA can't wrap the cell 'words' of class Embedding"),
    ],
)
def test_mistakes(twins, options, message):
    with pytest.raises(InputError, match=message):
        get_peft_model(twins.make_model(), GraloraConfig(**options))
