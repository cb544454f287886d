"""C3A against torch + peft on twin models."""

from __future__ import annotations

import mindspore as ms
import numpy as np
import pytest
import torch
from mindspore import Tensor, nn
from peft.utils.constants import TRANSFORMERS_MODELS_TO_C3A_TARGET_MODULES_MAPPING

from mindpeft import get_peft_model
from mindpeft.errors import InputError
from mindpeft.tuners.c3a import C3AConfig
from tests.parity.cases.c3a import WRONG, TrueGradient
from tests.tuners import against_peft as check

pytestmark = pytest.mark.usefixtures("graph_mode")

C3A = check.Method("C3AConfig", {"block_size": 8, "init_weights": "gaussian"}, noise=0.3)
OPTIONS = {
    "default_targets": {"bias": "c3a_only"},
    "widths_differ": {
        "target_modules": ["intermediate", "dense"],
        "block_size_pattern": {"attention.output.dense": 4, "encoder.layer.1.output.dense": 2},
        "task_type": "SEQ_CLS",
    },
}


@check.each_option(OPTIONS)
def test_reads_what_peft_wrote(mode, twins, tmp_path, name):
    check.check_reading(twins, tmp_path, C3A, **OPTIONS[name])


def test_peft_reads_what_we_wrote(twins, tmp_path):
    check.check_writing(twins, tmp_path, C3A, **OPTIONS["widths_differ"])


def test_pynative_gives_the_same(twins, tmp_path):
    check.check_pynative(twins, tmp_path, C3A, **OPTIONS["widths_differ"])


@pytest.mark.parametrize("init", [True, False, "gaussian", "kaiming_uniform", "xavier_uniform"])
def test_initial_values(twins, init):
    check.check_initial_values(twins, C3A, target_modules=["intermediate", "query"], init_weights=init)


def test_switching(twins):
    check.check_switching(twins, C3A, OPTIONS["default_targets"], OPTIONS["widths_differ"], {"block_size": 4})


def test_default_targets_are_pefts():
    theirs = TRANSFORMERS_MODELS_TO_C3A_TARGET_MODULES_MAPPING
    assert {name: C3AConfig.DEFAULT_TARGETS[name] for name in theirs} == theirs


def test_the_oracle_is_pefts_but_for_the_gradient_of_the_input():
    """Once PEFT's own gradient is right the stand-in of the tests can go."""
    torch.manual_seed(0)
    kernel = torch.randn(2, 3, 4, dtype=torch.double, requires_grad=True)
    x = torch.randn(5, 12, dtype=torch.double, requires_grad=True)
    theirs, true = WRONG.apply(x, kernel), TrueGradient.apply(x, kernel)
    torch.testing.assert_close(theirs, true)
    direction = torch.randn_like(theirs)
    of_theirs, of_true = (torch.autograd.grad(y, (x, kernel), direction) for y in (theirs, true))
    torch.testing.assert_close(of_theirs[1], of_true[1])
    assert (of_theirs[0] - of_true[0]).abs().max() > 1


def test_half_precision_base_keeps_a_float32_adapter():
    cell = nn.SequentialCell(nn.Dense(8, 8, dtype=ms.float16))
    model = get_peft_model(cell, C3AConfig(target_modules=["0"], block_size=4))
    assert {str(p.dtype) for p in model.trainable_params()} == {"Float32"}
    x = Tensor(np.random.default_rng(0).normal(size=(3, 8)).astype(np.float16))
    y = model(x)
    assert y.dtype == ms.float16
    model.merge_adapter()
    np.testing.assert_allclose(y.asnumpy(), model(x).asnumpy(), atol=3e-2)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"block_size": 0}, "block_size must be a positive integer, not 0"),
        (
            {"block_size": 3},
            "block_size=3 does not divide both widths of .*, 16 and 16; the largest .* is 16",
        ),
        ({"block_size_pattern": {"query": "8"}}, r"block_size_pattern\['query'\] must be a positive integer"),
        (
            {"init_weights": "xavier"},
            "init_weights must be one of gaussian, .*; did you mean 'xavier_uniform'",
        ),
        ({"bias": "lora_only"}, "bias must be one of none, all, c3a_only"),
        ({"target_modules": ["c_attn"]}, "C3A can't wrap the cell 'c_attn' of class Conv1D"),
    ],
)
def test_mistakes(twins, options, message):
    with pytest.raises(InputError, match=message):
        get_peft_model(twins.make_model(), C3AConfig(**options))
