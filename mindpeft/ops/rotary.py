"""Turning pairs of columns by the angles of their positions (rotary position embedding, Su et al. 2021)."""

from __future__ import annotations

import mindspore as ms
import mindspore.nn as nn
from mindspore import Tensor, ops

from mindpeft.ops.attention import SplitHeads
from mindpeft.ops.cpu import kernels_on
from mindpeft.ops.cpu.heads import SplitAndTurnKernel


class Rotate(nn.Cell):
    """Turns the first columns of every head; the two columns of a pair exchange their places and are weighed.

    A pair (a, b) becomes (a cos - b sin, b cos + a sin). The minus stands in the table of sines, so that only
    the exchange of columns is left to do here.
    """

    def __init__(self, size: int, interleaved: bool = False):
        """
        Args:
            size: how many columns of a head are turned; those behind stay as they are.
            interleaved: neighbours are a pair; else a column of the first half and one of the second.
        """
        super().__init__()
        self.size = size
        self.turn = _Turn(_ExchangeNeighbours() if interleaved else _ExchangeHalves())
        self.concat = ops.Concat(-1)

    def construct(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """
        Args:
            x: (batch, heads, length, width).
            cos, sin: (batch, heads, length, size), the first sine of each pair negative.
        """
        if self.size == x.shape[-1]:
            return self.turn(x, cos, sin)
        return self.concat((self.turn(x[..., : self.size], cos, sin), x[..., self.size :]))


class SplitAndRotate(nn.Cell):
    """Splits rows into heads, as `mindpeft.ops.attention.SplitHeads` does, and turns each head's columns."""

    def __init__(self, heads: int, size: int, interleaved: bool = False):
        """
        Args:
            heads: how many.
            size, interleaved: as for `Rotate`.
        """
        super().__init__()
        self.split = SplitHeads(heads)
        self.rotate = Rotate(size, interleaved)
        self.kernel = SplitAndTurnKernel(heads, interleaved) if kernels_on() else None

    def construct(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """
        Args:
            x: (batch, length, heads * width).
            cos, sin: as for `Rotate`; with kernels of one head.
        """
        if self.kernel is not None and x.dtype == ms.float32:
            return self.kernel(x, cos, sin)
        return self.rotate(self.split(x), cos, sin)


class _Turn(nn.Cell):
    """``x cos + exchange(x) sin``; cos and sin get no gradient."""

    def __init__(self, exchange: nn.Cell):
        super().__init__()
        self.exchange = exchange

    def construct(self, x, cos, sin):
        return x * cos + self.exchange(x) * sin

    def bprop(self, x, cos, sin, out, dout):
        # Exchanging is its own transpose, and exchanged sines have the opposite sign.
        return dout * cos - self.exchange(dout) * sin, ops.zeros_like(cos), ops.zeros_like(sin)


class _ExchangeHalves(nn.Cell):
    """(a1 a2 ... b1 b2 ...) to (b1 b2 ... a1 a2 ...)."""

    def __init__(self):
        super().__init__()
        self.split = ops.Split(-1, 2)
        self.concat = ops.Concat(-1)

    def construct(self, x):
        first, second = self.split(x)
        return self.concat((second, first))


class _ExchangeNeighbours(nn.Cell):
    """(a1 b1 a2 b2 ...) to (b1 a1 b2 a2 ...)."""

    def __init__(self):
        super().__init__()
        self.split = ops.Split(-1, 2)
        self.concat = ops.Concat(-1)

    def construct(self, x):
        first, second = self.split(x.reshape((*x.shape[:-1], -1, 2)))
        return self.concat((second, first)).reshape(x.shape)
