"""Layer normalisation: the CPU's composition, the plain one and torch agree, gradients too."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from mindpeft.ops.normalization import CpuLayerNorm, CpuRmsNorm, LayerNorm, RmsNorm
from tests.ops.compare import assert_close, run, run_torch

SHAPES = [(1, 1, 5), (3, 7, 33), (2, 384), (4, 1, 2)]


def inputs(shape, scale=1.0, offset=0.0, dtype=np.float32):
    rng = np.random.default_rng(0)
    width = shape[-1]
    x = rng.normal(offset, scale, shape)
    return [value.astype(dtype) for value in (x, rng.normal(1, 0.3, width), rng.normal(0, 0.3, width))]


def theirs(eps):
    return lambda x, weight, bias: torch.nn.functional.layer_norm(x, weight.shape, weight, bias, eps)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("eps", [1e-12, 1e-5])
def test_equals_torch_and_the_plain_one(shape, eps):
    arguments = inputs(shape)
    found = run(CpuLayerNorm(eps), *arguments)
    assert_close(found, run_torch(theirs(eps), *arguments), 1e-5)
    assert_close(found, run(LayerNorm(eps), *arguments), 1e-5)


@pytest.mark.parametrize(("scale", "offset"), [(1e4, 0.0), (1e-3, 0.0), (1.0, 100.0)])
def test_large_small_and_shifted_values(scale, offset):
    arguments = inputs((3, 5, 33), scale, offset)
    # rounding of the inputs' mean is magnified by offset / scale
    assert_close(
        run(CpuLayerNorm(1e-12), *arguments), run_torch(theirs(1e-12), *arguments), 1e-5 * max(1, offset)
    )


def test_constant_rows_stay_finite():
    x, weight, bias = inputs((2, 3, 8))
    x[:] = 2.0
    assert_close(run(CpuLayerNorm(1e-5), x, weight, bias), run_torch(theirs(1e-5), x, weight, bias), 1e-5)


def test_float16():
    arguments = inputs((3, 7, 32), dtype=np.float16)
    assert_close(run(CpuLayerNorm(1e-5), *arguments), run_torch(theirs(1e-5), *arguments), 1e-2)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("scale", [1.0, 1e4, 1e-3])
def test_rms_norm(shape, scale):
    x, weight, _ = inputs(shape, scale)
    expected = run_torch(lambda x, w: torch.nn.functional.rms_norm(x, w.shape, w, 1e-6), x, weight)
    for norm in (CpuRmsNorm, RmsNorm):
        assert_close(run(norm(1e-6), x, weight), expected, 1e-5)
