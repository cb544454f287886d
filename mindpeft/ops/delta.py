"""The dense product with the sum of a weight and a delta weight."""

from __future__ import annotations

import mindspore.nn as nn
from mindspore import Tensor, ops

from mindpeft.ops.cpu import kernels_on
from mindpeft.ops.cpu.delta import DeltaKernel, SparseDeltaKernel
from mindpeft.ops.linear import linear


class DeltaProduct(nn.Cell):
    """``x @ (weight + delta).T + bias``; all of float32."""

    def __init__(self):
        super().__init__()
        self.kernel = DeltaKernel() if kernels_on() else None
        self.bias_kernel = DeltaKernel(bias=True) if kernels_on() else None

    def construct(self, x: Tensor, weight: Tensor, delta: Tensor, bias: Tensor | None = None) -> Tensor:
        """x (..., in), weight and delta (out, in), bias (out,)."""
        if self.kernel is None:
            return linear(x, weight + delta, bias)
        if bias is None:
            return self.kernel(x, weight, delta)
        return self.bias_kernel(x, weight, delta, bias)


class SparseDeltaProduct(nn.Cell):
    """The same with a sparse delta."""

    def __init__(self):
        super().__init__()
        self.kernel = SparseDeltaKernel() if kernels_on() else None
        self.bias_kernel = SparseDeltaKernel(bias=True) if kernels_on() else None

    def construct(
        self, x: Tensor, weight: Tensor, values: Tensor, places: Tensor, bias: Tensor | None = None
    ) -> Tensor:
        """values (n,); places (2, n): their rows and columns, of int32; numbers at one place add up."""
        if self.kernel is None:
            return linear(x, weight + dense(values, places, weight.shape), bias)
        if bias is None:
            return self.kernel(x, weight, values, places)
        return self.bias_kernel(x, weight, values, places, bias)


def dense(values: Tensor, places: Tensor, shape: tuple[int, int]) -> Tensor:
    """The matrix of that shape with some numbers at rows and columns (2, n), where they add up."""
    flat = ops.zeros((shape[0] * shape[1],), values.dtype)
    flat = ops.tensor_scatter_elements(flat, places[0] * shape[1] + places[1], values, reduction="add")
    return flat.reshape(shape)
