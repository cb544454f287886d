"""One operation, its plain composition and torch's: values and gradients side by side."""

from __future__ import annotations

from collections.abc import Callable

import mindspore as ms
import numpy as np
import torch
from mindspore import Tensor

from tests.ops.cotangent import cotangent


def run(operation: Callable, *inputs: np.ndarray, seed: int = 9) -> list[np.ndarray]:
    """The operation's value, and the gradients of ``sum(value * c)`` for a fixed random c, ours."""
    tensors = [Tensor(value) for value in inputs]
    value = operation(*tensors)
    weights = Tensor(cotangent(value.shape, seed)).astype(value.dtype)

    def total(*arguments):
        return (operation(*arguments) * weights).sum()

    floats = tuple(i for i, value in enumerate(inputs) if value.dtype.kind == "f")
    gradients = ms.grad(total, floats)(*tensors)
    gradients = gradients if isinstance(gradients, tuple) else (gradients,)
    return [tensor.astype(ms.float32).asnumpy() for tensor in (value, *gradients)]


def run_torch(operation: Callable, *inputs: np.ndarray, seed: int = 9) -> list[np.ndarray]:
    """The same in torch, in float64."""
    tensors = [
        torch.tensor(value, dtype=torch.float64 if value.dtype.kind == "f" else None) for value in inputs
    ]
    for tensor in tensors:
        tensor.requires_grad_(tensor.is_floating_point())
    value = operation(*tensors)
    (value * torch.tensor(cotangent(tuple(value.shape), seed))).sum().backward()
    gradients = [tensor.grad for tensor in tensors if tensor.requires_grad]
    return [tensor.detach().numpy() for tensor in (value, *gradients)]


def assert_close(found: list[np.ndarray], expected: list[np.ndarray], tolerance: float) -> None:
    """Each array finite, and within ``tolerance`` of the largest value expected (or of 1)."""
    assert len(found) == len(expected)
    for index, (mine, other) in enumerate(zip(found, expected, strict=True)):
        assert mine.shape == other.shape
        assert np.isfinite(mine).all(), index
        assert np.abs(mine - other).max() <= tolerance * max(1.0, np.abs(other).max()), index
