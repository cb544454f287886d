"""The projected cross-entropy against torch."""

from __future__ import annotations

import mindspore as ms
import numpy as np
import pytest
from mindspore import Tensor

from mindpeft.ops.cpu.loss import ProjectedLossKernel
from tests.ops.cpu.cases import Case, Random, some
from tests.ops.cpu.cells import assert_equals_torch
from tests.ops.cpu.expected import error, expectation, worst


def case_of(rows: int, scale: float = 1.0) -> Case:
    random = Random(3)
    hidden, weight = random.normal(rows, 17, scale=scale), random.normal(65, 17)
    return Case("loss", (hidden, weight), (random.generator.integers(0, 65, rows).astype(np.int32),))


def test_equals_torch(kernels, seed):
    assert worst(kernels, some("loss", 60, seed)) < 1e-5


def test_equals_torch_with_a_weight_in_bfloat16(kernels, seed):
    """The logits' gradients are rounded to it, too."""
    cases = some("loss bfloat16", 60, seed)
    assert worst(kernels, cases) < 2**-7
    values = [error(case.run(kernels)[:1], expectation(case)[:1]) for case in cases]
    assert max(values) < 1e-5


def test_cell():
    case = case_of(30)
    cell = ProjectedLossKernel()
    assert_equals_torch(lambda hidden, weight: cell(hidden, weight, Tensor(case.fixed[0]))[0], case)


def test_cell_with_a_weight_in_bfloat16():
    case, cell = some("loss bfloat16", 2)[1], ProjectedLossKernel()

    def ours(hidden, weight):
        return cell(hidden, weight.astype(ms.bfloat16), Tensor(case.fixed[0]))[0]

    assert_equals_torch(ours, case, 2**-6)


@pytest.mark.parametrize("scale", [30.0, 1000.0])
def test_large_logits(kernels, scale):
    """Each is good to 7 digits, so that of exp(-1000) 1e-4 is as good as can be."""
    case = case_of(20, scale)
    assert error(case.run(kernels), expectation(case)) < 1e-7 * scale * 65**0.5


@pytest.mark.parametrize("label", [-100, -1])
@pytest.mark.parametrize("rows", [0, 1, 30])
def test_no_label_that_counts(kernels, rows, label):
    case = case_of(rows)
    case.fixed[0][:] = label
    assert not any(array.any() for array in case.run(kernels))


@pytest.mark.parametrize("label", [65, 66, 2**31 - 1])
@pytest.mark.parametrize("rows", [1, 30])
def test_a_label_beyond_the_vocabulary(kernels, rows, label):
    """The loss says so; nothing is written or read beyond the tensors."""
    case = case_of(rows)
    case.fixed[0][0] = label
    loss, dhidden, dweight = case.run(kernels)
    assert np.isnan(loss)
    assert not dhidden[0].any()
    assert np.isfinite(dweight).all()


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("place", [0, 1])
def test_one_bad_number_goes_where_it_goes_in_torch(kernels, place, value):
    case = case_of(30)
    case.inputs[place].flat[5] = value
    assert error(case.run(kernels), expectation(case)) < 1e-5


def test_rows_left_out_may_hold_anything(kernels):
    """Nothing is computed for them, where torch's weight would get 0 NaN."""
    case = case_of(30)
    case.fixed[0][::3] = -100
    expected = expectation(case)
    case.inputs[0][::3] = np.nan
    assert error(case.run(kernels), expected) < 1e-5


@pytest.mark.slow
def test_a_vocabulary_so_large_that_rows_are_taken_sixteen_at_a_time(kernels):
    random = Random(0)
    hidden, weight = random.normal(37, 3), random.normal(2_500_000, 3)
    case = Case("loss", (hidden, weight), (random.generator.integers(0, 2_500_000, 37).astype(np.int32),))
    assert error(case.run(kernels), expectation(case)) < 2e-4  # of sums of 2.5 million numbers
