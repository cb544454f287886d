"""Products with one factor for each column."""

from __future__ import annotations

import mindspore.nn as nn
from mindspore import Tensor, ops

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


_scale = _ScaleColumns()


def scale_columns(x: Tensor, factors: Tensor) -> Tensor:
    """``x`` (..., columns) with each column multiplied by its factor, of which there are ``columns``."""
    return _scale(x.reshape((-1, x.shape[-1])), factors.reshape((-1,))).reshape(x.shape)
