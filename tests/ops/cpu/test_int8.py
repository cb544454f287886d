"""Products with weights of int8, against torch with what those stand for."""

from __future__ import annotations

import numpy as np
import pytest
from mindspore import Tensor

from mindpeft.nn.int8 import quantised
from mindpeft.ops.cpu.int8 import Int8LinearBiasKernel, Int8LinearKernel
from tests.ops.cotangent import cotangent
from tests.ops.cpu.cases import Case, Random, int8_case, some
from tests.ops.cpu.cells import assert_equals_torch
from tests.ops.cpu.expected import error, expectation, worst
from tests.ops.cpu.native import Kernels

FAMILIES = ["int8_linear", "int8_linear_bias"]
SIZES = [(17, 33), (257, 65), (1, 7), (768, 130)]  # (in, out)


def real_case(rows: int, into: int, out: int) -> Case:
    """Of normal numbers, which are rounded."""
    random = Random(rows)
    return Case(
        "int8_linear_bias",
        (random.normal(rows, into), random.normal(out)),
        quantised(random.normal(out, into)),
    )


def bound_of_rounding(x: np.ndarray, weight: np.ndarray, scale: np.ndarray) -> np.ndarray:
    """How far off a product is at most if each row of x is rounded to 127 steps on either side."""
    half_a_step = np.abs(x).max(1, keepdims=True) / 254
    return half_a_step * (np.abs(weight.astype(np.float64)).sum(1) * scale)


@pytest.mark.parametrize("family", FAMILIES)
def test_equals_torch(kernels, family, seed):
    assert worst(kernels, some(family, 30, seed)) < 1e-5


@pytest.mark.parametrize(("into", "out"), SIZES)
@pytest.mark.parametrize("rows", [1, 3, 8])
def test_up_to_eight_rows_are_not_rounded(kernels, rows, into, out):
    case = real_case(rows, into, out)
    assert error(case.run(kernels)[:1], expectation(case)[:1]) < 1e-5


@pytest.mark.parametrize(("into", "out"), SIZES)
@pytest.mark.parametrize("rows", [9, 100, 300])
def test_more_rows_are_rounded_to_eight_bits(kernels, rows, into, out):
    case = real_case(rows, into, out)
    found, expected = case.run(kernels)[0], expectation(case)[0]
    bound = bound_of_rounding(case.inputs[0], *case.fixed)
    assert (np.abs(found - expected) <= bound + 1e-5 * np.abs(expected).max()).all()
    if not kernels.library.has_fast_int8_products():
        assert error([found], [expected]) < 1e-5


@pytest.mark.parametrize(("into", "out"), SIZES)
@pytest.mark.parametrize("rows", [1, 9, 300])
def test_gradient_is_rounded_to_bfloat16_at_most(kernels, rows, into, out):
    """The numbers of dy, times the scales, are: each by a 256th at most."""
    case = real_case(rows, into, out)
    weight, scale = case.fixed
    found, expected = case.run(kernels)[1], expectation(case)[1]
    terms = np.abs(cotangent((rows, out))) @ np.abs(weight * scale[:, None].astype(np.float64))
    assert (np.abs(found - expected) <= 2**-8 * terms + 1e-6).all()


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("lead", [(2, 6), (5,), (0,)])
def test_cells(family, lead):
    cell = Int8LinearKernel() if family == "int8_linear" else Int8LinearBiasKernel()
    case = int8_case(Random(0), family, lead, 17, 33)
    frozen = [Tensor(value) for value in case.fixed]
    assert_equals_torch(lambda x, *bias: cell(x, *frozen, *bias), case)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("rows", [8, 20])
def test_a_bad_number_spoils_its_row_alone(kernels: Kernels, rows, value):
    x, bias, weight, scale = (*real_case(rows, 17, 33).inputs, *real_case(rows, 17, 33).fixed)
    x[5, 2] = value
    found = kernels.one("int8_linear_bias", x, weight, scale, bias, to=(rows, 33))
    assert not np.isfinite(found[5][weight[:, 2] != 0]).any()
    assert not np.isnan(value) or np.isnan(found[5]).all()
    assert np.isfinite(np.delete(found, 5, 0)).all()


@pytest.mark.parametrize("rows", [8, 20])
def test_rows_of_zeros_give_the_bias(kernels, rows):
    x, bias, weight, scale = (*real_case(rows, 17, 33).inputs, *real_case(rows, 17, 33).fixed)
    for small in (0.0, 1e-40):
        x[5] = small
        found = kernels.one("int8_linear_bias", x, weight, scale, bias, to=(rows, 33))
        np.testing.assert_array_equal(found[5], bias)


@pytest.mark.parametrize("size", [1e-30, 1e30])
def test_small_and_large_rows(kernels, size):
    x, _, weight, scale = (*real_case(20, 17, 33).inputs, *real_case(20, 17, 33).fixed)
    plain, scaled = (kernels.one("int8_linear", x * s, weight, scale, to=(20, 33)) for s in (1, size))
    np.testing.assert_allclose(scaled / np.float32(size), plain, rtol=0, atol=1e-2 * np.abs(plain).max())
