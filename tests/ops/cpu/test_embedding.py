"""Rows of a table against torch."""

from __future__ import annotations

import mindspore as ms
import numpy as np
import pytest
from mindspore import Tensor

from mindpeft.ops.cpu.embedding import EmbeddingKernel
from tests.ops.cpu.cases import Case, Random, some
from tests.ops.cpu.cells import assert_equals_torch
from tests.ops.cpu.expected import expectation, worst


@pytest.mark.parametrize("kind", ["", " bfloat16"])
def test_equals_torch(kernels, kind, seed):
    assert worst(kernels, some(f"embedding{kind}", 40, seed)) < 1e-5


@pytest.mark.parametrize("shape", [(2, 9), (0,)])
def test_cells(shape):
    cell, ids = EmbeddingKernel(), np.random.default_rng(0).integers(0, 5, shape).astype(np.int32)
    case = Case("embedding", (Random(0).normal(5, 7),), (ids,))
    assert_equals_torch(lambda weight: cell(weight, Tensor(ids)), case)


def test_a_trained_table_in_bfloat16():
    """Its gradient is in bfloat16 too, so the tolerance is that of eight bits."""
    cell, case = EmbeddingKernel(), some("embedding bfloat16", 3, 7)[2]
    assert_equals_torch(lambda weight: cell(weight.astype(ms.bfloat16), Tensor(case.fixed[0])), case, 2**-8)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_what_is_no_number_stays_in_its_row(kernels, value):
    weight = Random(0).normal(4, 17)
    weight[2, 3] = value
    case = Case("embedding", (weight,), (np.array([2, 0, 2], np.int32),))
    for found, expected in zip(case.run(kernels), expectation(case), strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-6)


def test_an_id_that_the_table_lacks_is_not_a_number_and_gets_no_gradient(kernels):
    weight, ids = Random(0).normal(4, 17), np.array([3, 4, -1, 0], np.int32)
    rows = kernels.one("embedding", ids, weight, to=(4, 17))
    assert np.isnan(rows).all(1).tolist() == [False, True, True, False]
    dweight = kernels.one("embedding_grad", ids, weight, np.ones((4, 17), np.float32), to=(4, 17))
    assert dweight[:, 0].tolist() == [1, 0, 0, 1]
