"""Which earlier positions a decoder's tokens see."""

from __future__ import annotations

import math
from typing import ClassVar

import mindspore as ms
import mindspore.nn as nn
import numpy as np
from mindspore import Tensor, ops

from mindpeft.ops.attention import FLOATS, lowest
from mindpeft.ops.cpu import kernels_on
from mindpeft.ops.cpu.attention import MaskRules
from mindpeft.ops.device import on_cpu


class CausalMask(nn.Cell):
    """The mask that ``Attention`` takes, so that a token sees itself and what is before it.

    Args:
        heads: of the queries.
        window: how many tokens each sees, itself included; None for all (Beltagy et al., 2020).
    """

    alibi: ClassVar[bool] = False

    def __init__(self, heads: int, window: int | None = None):
        super().__init__()
        self.rules = MaskRules(causal=True, window=window, alibi=self.alibi) if kernels_on() else None
        # With MindSpore's own operators of the CPU a broadcast in every layer would keep its buffers.
        self.heads = heads if on_cpu() and not kernels_on() else 1
        self.window = window
        self.tile = ops.Tile()

    def construct(
        self,
        attention_mask: Tensor | None,
        shape: tuple[int, int],
        dtype: ms.Type,
        first: Tensor | None = None,
    ) -> Tensor:
        """
        Args:
            attention_mask: None; or (batch, keys), 0 for padding, and the same number for all tokens that see
                each other: 1, or 1, 2, 3, ... for several samples in one row; or (batch, queries, keys), 1
                where a token may be seen if it is not a later one; or four axes of floats, added as they are.
            shape: (batch, queries).
            dtype: of the scores.
            first: (1,), the place of the first query among the keys; None if queries and keys are the same.

        Returns:
            (batch, heads, queries, keys), added to the scores; one head where a broadcast costs nothing. Or a
            description, if there are kernels, of (batch, keys) for float32.
        """
        if self.describes(attention_mask, dtype):
            return self.rules(attention_mask, first)
        batch, queries = shape
        if attention_mask is not None and attention_mask.ndim == 4 and attention_mask.dtype in FLOATS:
            return attention_mask.astype(dtype)
        keys = queries if attention_mask is None else attention_mask.shape[-1]
        seen = self.order(queries, keys, first).reshape((1, queries, keys))
        if attention_mask is None:
            seen = self.tile(seen, (batch, 1, 1))
        elif attention_mask.ndim == 2:
            seen = ops.logical_and(seen, self.together(attention_mask, queries, first))
        else:
            seen = ops.logical_and(seen, attention_mask.reshape((batch, queries, keys)) != 0)
        additive = (1.0 - seen.astype(ms.float32)) * lowest(dtype)
        return self.tile(additive.astype(dtype).reshape((batch, 1, queries, keys)), (1, self.heads, 1, 1))

    def describes(self, attention_mask: Tensor | None, dtype: ms.Type) -> bool:
        """Whether a few rules stand for the mask; runs inside a graph."""
        pairs = attention_mask is not None and attention_mask.ndim != 2
        return self.rules is not None and not pairs and dtype == ms.float32

    def order(self, queries: int, keys: int, first: Tensor | None) -> Tensor:
        """(queries, keys), whether the key is the query's own, or earlier within the window."""
        if first is None:
            return _order(queries, keys, self.window)
        places = (ops.arange(queries) + first).astype(ms.int32).reshape((queries, 1))
        others = ops.arange(keys).astype(ms.int32).reshape((1, keys))
        seen = others <= places
        return seen if self.window is None else ops.logical_and(seen, places - others < self.window)

    def together(self, attention_mask: Tensor, queries: int, first: Tensor | None) -> Tensor:
        """(batch, queries, keys), whether both are of one sample; padding sees every sample, as in HF."""
        batch, keys = attention_mask.shape
        mine = attention_mask
        if first is not None:
            places = (ops.arange(queries) + first).astype(ms.int32)
            mine = ops.gather(attention_mask, places, 1)
        mine = self.tile(mine.reshape((batch, queries, 1)), (1, 1, keys))
        others = self.tile(attention_mask.reshape((batch, 1, keys)), (1, queries, 1))
        return ops.logical_and(others != 0, ops.logical_or(mine == others, mine == 0))


class AlibiMask(CausalMask):
    """The same, with a share of each key's place added for every head (Press et al., 2022).

    Adding it per key rather than per distance is the same to a softmax, and what BLOOM was trained with:
    places are counted over the tokens that are no padding.
    """

    alibi = True

    def __init__(self, heads: int, window: int | None = None):
        super().__init__(heads, window)
        self.all_heads = heads
        self.slopes = Tensor(np.array(alibi_slopes(heads), np.float32).reshape((1, heads, 1)))

    def construct(self, attention_mask, shape, dtype, first=None):
        mask = super().construct(attention_mask, shape, dtype, first)
        if self.describes(attention_mask, dtype):
            return mask
        batch, keys = shape[0], mask.shape[-1]
        if attention_mask is not None and attention_mask.ndim == 2:
            real = (attention_mask != 0).astype(ms.float32)
            places = (ops.cumsum(real, 1) - 1) * real
        else:
            places = self.tile(ops.arange(keys).astype(ms.float32).reshape((1, keys)), (batch, 1))
        bias = self.tile(places.reshape((batch, 1, keys)), (1, self.all_heads, 1)) * self.slopes
        bias = bias.astype(dtype).reshape((batch, self.all_heads, 1, keys))
        return mask + self.tile(bias, (1, 1, mask.shape[2], 1))


def alibi_slopes(heads: int) -> list[float]:
    """Geometric series for a power of two; for other numbers those of the next, every second one."""
    power = 2 ** math.floor(math.log2(heads))
    slopes = [2 ** (-8 * (i + 1) / power) for i in range(power)]
    return slopes + [2 ** (-8 * (2 * i + 1) / (2 * power)) for i in range(heads - power)]


@ops.constexpr
def _order(queries: int, keys: int, window: int | None) -> Tensor:
    distance = np.arange(queries)[:, None] - np.arange(keys)[None, :]
    return Tensor((distance >= 0) & (distance < (window or keys)))
