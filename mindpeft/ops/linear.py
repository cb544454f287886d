"""The dense product."""

from __future__ import annotations

import mindspore as ms
import mindspore.nn as nn
from mindspore import Tensor, ops

from mindpeft.ops.cpu import kernels_on
from mindpeft.ops.cpu.linear import WEIGHT_TYPES, LinearBiasKernel, LinearKernel

_matmul, _matmul_turned = ops.MatMul(transpose_b=True), ops.MatMul()
_bias_add = ops.BiasAdd()


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, turned: bool = False) -> Tensor:
    """Return ``x @ weight.T + bias``.

    Args:
        x: (..., in).
        weight: (out, in), as in PyTorch, or (in, out) if ``turned``; cast to the precision of x.
        bias: (out,) or None; the same.
        turned: a constant of the graph.

    Returns:
        Tensor of shape (..., out).
    """
    # Rows are folded into one axis: BiasAdd wants (N, C), and a plain `+` would broadcast, which on the CPU
    # keeps four times the size of its output for the life of the graph.
    rows, weight = x.reshape((-1, x.shape[-1])), weight.astype(x.dtype)
    rows = _matmul_turned(rows, weight) if turned else _matmul(rows, weight)
    if bias is not None:
        rows = _bias_add(rows, bias.astype(x.dtype))
    return rows.reshape((*x.shape[:-1], rows.shape[-1]))


class Product(nn.Cell):
    """`linear` as a Cell, which takes the device's own operator.

    Args:
        turned: weights are (in, out).
    """

    def __init__(self, turned: bool = False):
        super().__init__()
        self.turned = turned
        self.kernel = LinearKernel(turned) if kernels_on() else None
        self.bias_kernel = LinearBiasKernel(turned) if kernels_on() else None

    def construct(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """The arguments are those of `linear`."""
        if self.kernel is None or x.dtype != ms.float32 or weight.dtype not in WEIGHT_TYPES:
            return linear(x, weight, bias, self.turned)
        if bias is None:
            return self.kernel(x, weight)
        return self.bias_kernel(x, weight, bias.astype(ms.float32))
