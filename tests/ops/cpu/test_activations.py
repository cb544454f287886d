"""Activations and gates against torch, number by number."""

from __future__ import annotations

import numpy as np
import pytest

from mindpeft.ops.cpu.activations import ACTIVATIONS, ActivationKernel, GateKernel
from tests.ops.cpu.cases import Case, Random, numbers, some
from tests.ops.cpu.cells import assert_equals_torch
from tests.ops.cpu.expected import error, expectation, worst

NAMES = sorted(set(ACTIVATIONS.values()))


@pytest.mark.parametrize("family", [*NAMES, *(f"{name}_gate" for name in NAMES)])
def test_equals_torch(kernels, family, seed):
    assert worst(kernels, some(family, 60, seed)) < 1e-5


@pytest.mark.parametrize("name", sorted(ACTIVATIONS))
def test_cells(name):
    x, up = Random(0).normal(3, 7, 5, scale=3), Random(1).normal(3, 7, 5)
    assert_equals_torch(ActivationKernel(name), Case(ACTIVATIONS[name], (x,)))
    assert_equals_torch(GateKernel(name), Case(f"{ACTIVATIONS[name]}_gate", (x, up)))
    assert_equals_torch(ActivationKernel(name), Case(ACTIVATIONS[name], (x[:0],)))


@pytest.mark.parametrize("name", NAMES)
def test_each_number_between_the_tails(kernels, name):
    """An array's largest number says nothing of the small ones."""
    case = Case(name, (np.linspace(-30, 30, 200_001, dtype=np.float32),))
    for found, expected in zip(case.run(kernels), expectation(case), strict=True):
        assert np.abs(found - expected).max() < 6e-6  # the slopes are weighed with numbers of up to 4.5
        near = np.abs(case.inputs[0]) < 2
        assert np.abs(found - expected)[near].max() < 2e-6


@pytest.mark.parametrize("name", NAMES)
def test_the_tails_are_flat(kernels, name):
    """However far they go: an error of one unit in the last place there would grow with x."""
    far = numbers(40, 1e2, 1e4, 1e10, 1e18)
    value, slope = Case(name, (np.concatenate((far, -far)),)).run(kernels)
    bounded = name == "sigmoid"
    np.testing.assert_array_equal(value[:5], 1 if bounded else far)
    np.testing.assert_allclose(value[5:], 0, atol=1e-15)
    _, ones = Case(name, (np.full_like(np.concatenate((far, -far)), 40),)).run(kernels)  # the cotangent
    np.testing.assert_allclose(slope[:5], 0 if bounded else ones[:5], rtol=0, atol=1e-15)
    np.testing.assert_allclose(slope[5:], 0, atol=1e-15)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 0.0, -0.0, 1e-30, 1e-40])
def test_odd_numbers_go_where_they_go_in_torch(kernels, name, value):
    x, up = Random(0).normal(37), Random(1).normal(37)
    x[5] = up[20] = value
    for case in (Case(name, (x,)), Case(f"{name}_gate", (x, up))):
        expected = expectation(case)
        if np.isinf(value):  # the limit of the slope, 0 or 1, or NaN: torch's kinds differ among themselves
            found = case.run(kernels)
            assert all(np.isfinite(np.delete(array, (5, 20))).all() for array in found)
            assert error(found[:1], expected[:1]) < 1e-5
        else:
            assert error(case.run(kernels), expected) < 1e-5
