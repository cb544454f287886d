"""Products with a Kronecker product against torch."""

from __future__ import annotations

import pytest

from mindpeft.ops.cpu.kron import KronKernel
from mindpeft.ops.kron import KronProduct, kron_linear
from tests.ops.cpu.cases import Case, Random, some
from tests.ops.cpu.cells import assert_equals_torch
from tests.ops.cpu.expected import worst


def case_of(lead: tuple[int, ...]) -> Case:
    random = Random(0)
    return Case("kron_linear", (random.normal(*lead, 6 * 7), random.normal(5, 6), random.normal(3, 7)))


def test_equals_torch(kernels, seed):
    # Gradients of the small matrices are sums over rows and blocks, of which little may be left.
    assert worst(kernels, some("kron_linear", 100, seed)) < 3e-5


def test_more_rows_than_are_worked_on_together(kernels):
    random = Random(1)
    inputs = random.normal(700, 20 * 31), random.normal(9, 20), random.normal(41, 31)
    assert worst(kernels, [Case("kron_linear", inputs)]) < 1e-5


@pytest.mark.parametrize("lead", [(2, 6), (1,), (0,)])
@pytest.mark.parametrize("cell", [KronKernel, KronProduct])
def test_cells(cell, lead):
    assert_equals_torch(cell(), case_of(lead))


def test_without_kernels():
    assert_equals_torch(kron_linear, case_of((2, 6)))
