"""Products with one factor for each column."""

from __future__ import annotations

from mindspore import Tensor, ops

_tile = ops.Tile()


def every_row(values: Tensor, like: Tensor) -> Tensor:
    """``values`` (columns) repeated to the shape of ``like`` (..., columns).

    On the CPU a broadcasting operator keeps four times its output; Tile does not.
    """
    rows = like.size // like.shape[-1]
    return _tile(values.reshape((1, -1)), (rows, 1)).reshape(like.shape)


def scale_columns(x: Tensor, factors: Tensor) -> Tensor:
    """``x`` (..., columns) with each column multiplied by its factor, of which there are ``columns``."""
    return x * every_row(factors, x)
