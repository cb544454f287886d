"""Products with one factor for each column."""

from __future__ import annotations

import mindspore as ms
import mindspore.nn as nn
from mindspore import Tensor, ops

from mindpeft.ops.cpu import kernels_on
from mindpeft.ops.cpu.columns import ScaleColumnsKernel

_tile = ops.Tile()


def every_row(values: Tensor, like: Tensor) -> Tensor:
    """``values`` (columns) repeated to the shape of ``like`` (..., columns).

    On the CPU a broadcasting operator keeps four times its output; Tile does not.
    """
    rows = like.size // like.shape[-1]
    return _tile(values.reshape((1, -1)), (rows, 1)).reshape(like.shape)


class _ScaleColumns(nn.Cell):
    """``x`` (rows, columns) times ``factors`` (columns,); the gradient of Tile would keep its input."""

    def construct(self, x, factors):
        return x * _tile(factors.reshape((1, -1)), (x.shape[0], 1))

    def bprop(self, x, factors, out, dout):
        return dout * _tile(factors.reshape((1, -1)), (x.shape[0], 1)), (dout * x).sum(0)


class ScaleColumns(nn.Cell):
    """``x`` (..., columns) with each column multiplied by its factor, of which there are ``columns``."""

    def __init__(self):
        super().__init__()
        self.kernel = ScaleColumnsKernel() if kernels_on() else None
        self.composed = _ScaleColumns()

    def construct(self, x: Tensor, factors: Tensor) -> Tensor:
        factors = factors.reshape((-1,))
        if self.kernel is not None and x.dtype == ms.float32 and factors.dtype == ms.float32:
            return self.kernel(x, factors)
        return self.composed(x.reshape((-1, x.shape[-1])), factors).reshape(x.shape)
