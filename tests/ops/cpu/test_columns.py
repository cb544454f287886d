"""Products with a factor for each column against torch."""

from __future__ import annotations

import pytest

from mindpeft.ops.cpu.columns import ScaleColumnsKernel
from tests.ops.cpu.cases import Case, Random, some
from tests.ops.cpu.cells import assert_equals_torch
from tests.ops.cpu.expected import worst


def test_equals_torch(kernels, seed):
    # a factor's gradient is a sum over rows, of which little may be left
    assert worst(kernels, some("scale_columns", 60, seed)) < 3e-5


@pytest.mark.parametrize("shape", [(2, 5, 7), (9, 1), (0, 7)])
def test_cell(shape):
    random = Random(0)
    case = Case("scale_columns", (random.normal(*shape), random.normal(shape[-1])))
    assert_equals_torch(ScaleColumnsKernel(), case)
