"""The dense product."""

from __future__ import annotations

import mindspore as ms
import mindspore.nn as nn
from mindspore import Tensor, ops

from mindpeft.ops.cpu import kernels_on
from mindpeft.ops.cpu.linear import WEIGHT_TYPES, LinearBiasKernel, LinearKernel

_matmul = ops.MatMul(transpose_b=True)
_bias_add = ops.BiasAdd()


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Return ``x @ weight.T + bias``.

    Args:
        x: (..., in).
        weight: (out, in), as in PyTorch; of another precision than x it is cast to that of x.
        bias: (out,) or None; the same.

    Returns:
        Tensor of shape (..., out).
    """
    # Rows are folded into one axis: BiasAdd wants (N, C), and a plain `+` would broadcast, which on the CPU
    # keeps four times the size of its output for the life of the graph.
    rows = _matmul(x.reshape((-1, x.shape[-1])), weight.astype(x.dtype))
    if bias is not None:
        rows = _bias_add(rows, bias.astype(x.dtype))
    return rows.reshape((*x.shape[:-1], weight.shape[0]))


class Product(nn.Cell):
    """`linear` as a Cell, which takes the device's own operator."""

    def __init__(self):
        super().__init__()
        self.kernel = LinearKernel() if kernels_on() else None
        self.bias_kernel = LinearBiasKernel() if kernels_on() else None

    def construct(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """The arguments are those of `linear`."""
        if self.kernel is None or x.dtype != ms.float32 or weight.dtype not in WEIGHT_TYPES:
            return linear(x, weight, bias)
        if bias is None:
            return self.kernel(x, weight)
        return self.bias_kernel(x, weight, bias.astype(ms.float32))
