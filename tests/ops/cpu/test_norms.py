"""Norms over the last axis against torch."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest
from mindspore import ops

from mindpeft.ops.cpu.norms import (
    LayerNormKernel,
    LayerNormOfSumKernel,
    RmsNormKernel,
    RmsNormOfSumKernel,
)
from tests.ops.cpu.cases import NORMS, Case, Random, norm_parameters, numbers, some
from tests.ops.cpu.cells import assert_equals_torch
from tests.ops.cpu.expected import error, expectation, worst

CELLS = {
    "rms_norm": RmsNormKernel,
    "rms_norm_of_sum": partial(RmsNormOfSumKernel, with_sum=False),
    "rms_norm_and_sum": partial(RmsNormOfSumKernel, with_sum=True),
    "layer_norm": LayerNormKernel,
    "layer_norm_of_sum": partial(LayerNormOfSumKernel, with_sum=False),
    "layer_norm_and_sum": partial(LayerNormOfSumKernel, with_sum=True),
}


def case_of(family: str, x: np.ndarray) -> Case:
    """A residual is the row above."""
    random = Random(5)
    residual = [np.roll(x, 1, 0)] if family.endswith("sum") else []
    return Case(family, (x, *residual, *norm_parameters(random, family, x.shape[-1])), (numbers(1e-5),))


@pytest.mark.parametrize("family", NORMS)
def test_equals_torch(kernels, family, seed):
    assert worst(kernels, some(family, 60, seed)) < 1e-5


@pytest.mark.parametrize("family", NORMS)
@pytest.mark.parametrize("shape", [(2, 5, 7), (0, 7)])
def test_cells(family, shape):
    cell = CELLS[family](1e-5)

    def values(*inputs):
        found = cell(*inputs)
        if family.endswith("and_sum"):
            return ops.concat([value.reshape((1, *value.shape)) for value in found])
        return found[0]

    assert_equals_torch(values, case_of(family, Random(0).normal(*shape)))


def test_a_layer_norm_of_one_column_is_its_bias(kernels):
    x, weight, bias = Random(0).normal(9, 1), numbers(1.7), numbers(-0.3)
    y, dx, dweight, _ = Case("layer_norm", (x, weight, bias), (numbers(1e-5),)).run(kernels)
    assert (y == bias).all()
    assert np.abs(dx).max() < 1e-4  # what rounding leaves, times 1 / sqrt(eps)
    assert not dweight.any()


@pytest.mark.parametrize("family", NORMS)
@pytest.mark.parametrize("width", [1, 2, 3])
def test_few_columns(kernels, family, width):
    """The gradient is what is left of nearly equal numbers: it has fewer digits."""
    case = case_of(family, Random(2).normal(257, width))
    assert error(case.run(kernels)[:1], expectation(case)[:1]) < 1e-5
    for found, expected in zip(case.run(kernels)[1:], expectation(case)[1:], strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-3, atol=3e-4)


def test_a_mean_far_from_0_costs_no_digits_of_the_variance(kernels):
    """A sum of squares less the square of a sum would leave none. The mean itself is good to 2**-13."""
    case = case_of("layer_norm", Random(0).normal(5, 257, mean=4096))
    assert error(case.run(kernels), expectation(case)) < 2**-11


@pytest.mark.parametrize("family", NORMS)
def test_rows_of_zeros(kernels, family):
    case = case_of(family, np.zeros((3, 17), np.float32))
    assert error(case.run(kernels), expectation(case)) < 1e-5


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("place", [0, 1, 2])
@pytest.mark.parametrize("family", NORMS)
def test_one_bad_number_goes_where_it_goes_in_torch(kernels, family, place, value):
    case = case_of(family, Random(0).normal(20, 17))
    if place < len(case.inputs):
        case.inputs[place].flat[5] = value
    found, expected = case.run(kernels), expectation(case)
    if np.isinf(value):  # less infinity, it is either, by the order of the sums
        found, expected = ([np.where(np.isfinite(a), a, 0) for a in arrays] for arrays in (found, expected))
    assert error(found, expected) < 1e-5
