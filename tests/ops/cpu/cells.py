"""The kernels as Cells: the same inputs in one piece and as views that are not."""

from __future__ import annotations

from collections.abc import Callable

from mindspore import Tensor, ops

from tests.ops.compare import run
from tests.ops.cpu.cases import Case
from tests.ops.cpu.expected import error, expectation


def view(tensor: Tensor) -> Tensor:
    """Every other number of a tensor twice the size."""
    strided = ops.stack((tensor, tensor), -1)[..., 0]
    assert tensor.size == 1 or not strided.is_contiguous()
    return strided


def assert_equals_torch(cell: Callable, case: Case, tolerance: float = 1e-5) -> None:
    """Value and gradients of ``cell(*inputs)``, with contiguous inputs and with views."""
    expected = expectation(case)
    assert error(run(cell, *case.inputs), expected) < tolerance
    if case.inputs[0].size == 0:  # MindSpore has no gradient for a view of nothing
        return
    assert error(run(lambda *inputs: cell(*map(view, inputs)), *case.inputs), expected) < tolerance
