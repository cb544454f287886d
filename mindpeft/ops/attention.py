"""Scaled dot-product attention and the split into heads."""

from __future__ import annotations

import math

import mindspore as ms
import mindspore.nn as nn
from mindspore import Tensor, ops

from mindpeft.ops.activations import tanh
from mindpeft.ops.cpu import kernels_on
from mindpeft.ops.cpu.attention import (
    AttentionKernel,
    CachedAttentionKernel,
    MaskedAttentionKernel,
    MaskRules,
    behind_past,
)
from mindpeft.ops.cpu.dropout import Noise
from mindpeft.ops.cpu.heads import MergeHeadsKernel, SplitHeadsKernel
from mindpeft.ops.device import on_cpu
from mindpeft.ops.dropout import dropout as dropout_cell

FLOATS = (ms.float32, ms.float16, ms.bfloat16)


class CpuSoftmax(nn.Cell):
    """Softmax over the last axis whose gradient does not broadcast: on the CPU that keeps its buffers."""

    def __init__(self):
        super().__init__()
        self.softmax = ops.Softmax(-1)
        self.row_sum = ops.ReduceSum(keep_dims=True)
        self.tile = ops.Tile()

    def construct(self, x: Tensor) -> Tensor:
        return self.softmax(x)

    def bprop(self, x, out, dout):
        weighted = out * dout
        total = self.tile(self.row_sum(weighted, -1), (*(1,) * (x.ndim - 1), x.shape[-1]))
        return (weighted - out * total,)


def softmax() -> nn.Cell:
    """Return the Cell of the softmax over the last axis for the current device."""
    return CpuSoftmax() if on_cpu() else nn.Softmax(-1)


class SplitHeads(nn.Cell):
    """(batch, length, heads * size) to (batch, heads, length, size)."""

    def __init__(self, heads: int):
        super().__init__()
        self.heads = heads
        self.copy_by_head = on_cpu()
        self.split = ops.Split(-1, heads)
        self.stack = ops.Stack(1)
        self.kernel = SplitHeadsKernel(heads) if kernels_on() else None

    def construct(self, x: Tensor) -> Tensor:
        if self.kernel is not None and x.dtype == ms.float32:
            return self.kernel(x)
        if self.copy_by_head:  # Transpose keeps twice its size on the CPU
            return self.stack(self.split(x))
        batch, length, width = x.shape
        return ops.transpose(x.reshape((batch, length, self.heads, width // self.heads)), (0, 2, 1, 3))


class MergeHeads(nn.Cell):
    """(batch, heads, length, size) to (batch, length, heads * size)."""

    def __init__(self, heads: int):
        super().__init__()
        self.copy_by_head = on_cpu()
        self.unstack = ops.Unstack(1)
        self.concat = ops.Concat(-1)
        self.kernel = MergeHeadsKernel(heads) if kernels_on() else None

    def construct(self, x: Tensor) -> Tensor:
        if self.kernel is not None and x.dtype == ms.float32:
            return self.kernel(x)
        if self.copy_by_head:
            return self.concat(self.unstack(x))
        batch, heads, length, size = x.shape
        return ops.transpose(x, (0, 2, 1, 3)).reshape((batch, length, heads * size))


class Attention(nn.Cell):
    """``softmax(scale q k^T + mask) v`` with dropout on the weights (Vaswani et al., 2017).

    Several heads of queries may share one of keys and values (Ainslie et al., 2023).

    Args:
        heads: of the queries.
        size: columns of a head.
        dropout: the share of weights set to zero while training.
        scale: of the scores; ``1 / sqrt(size)`` if None.
        softcap: bounds the scores by ``softcap * tanh(scores / softcap)``.
    """

    def __init__(
        self,
        heads: int,
        size: int,
        dropout: float = 0.0,
        scale: float | None = None,
        softcap: float | None = None,
    ):
        super().__init__()
        self.scale = 1.0 / math.sqrt(size) if scale is None else scale
        self.scores = ops.BatchMatMul(transpose_b=True)
        self.mix = ops.BatchMatMul()
        self.softmax = softmax()
        self.dropout = dropout_cell(dropout)
        self.softcap = None if softcap is None else SoftCap(softcap)
        self.tile = ops.Tile()
        self.merge_heads = MergeHeads(heads)
        self.kernel = self.masked_kernel = self.cached_kernel = None
        if kernels_on():
            self.kernel = AttentionKernel(self.scale, softcap or 0.0)
            self.masked_kernel = MaskedAttentionKernel(self.scale, softcap or 0.0)
            self.cached_kernel = CachedAttentionKernel(self.scale, softcap or 0.0)
            self.noise = Noise(dropout)

    def construct(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None) -> Tensor:
        """Mix the values.

        Args:
            query: (batch, heads, length, size).
            key, value: (batch, key heads, keys, size); the heads are a multiple of the key heads.
            mask: added to the scores, broadcasts to (batch, heads, length, keys); or, where there are kernels
                and all is float32, a description of `mindpeft.ops.cpu.attention.MaskRules`.

        Returns:
            Tensor of shape (batch, length, heads * size).
        """
        if self.kernel is None or query.dtype != ms.float32:
            return self.merge_heads(self.composed(query, key, value, mask))
        if mask is None:
            return self.kernel(query, key, value, self.noise())[0]
        return self.masked_kernel(query, key, value, mask, self.noise())[0]

    def composed(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
        """The same of MindSpore's operators, (batch, heads, length, size); runs inside a graph."""
        shape, key_heads = query.shape, key.shape[1]
        query = query * self.scale
        if shape[1] != key_heads:  # the queries of a key's heads one below the other
            query = query.reshape((shape[0], key_heads, -1, shape[-1]))
            mask = None if mask is None else self.grouped(mask, shape, key_heads)
        scores = self.scores(query, key)
        if self.softcap is not None:
            scores = self.softcap(scores)
        if mask is not None:
            scores = scores + mask
        mixed = self.mix(self.dropout(self.softmax(scores)), value)
        return mixed.reshape((*shape[:3], value.shape[-1]))

    def grouped(self, mask: Tensor, shape: tuple[int, ...], key_heads: int) -> Tensor:
        """A mask for queries of shape (batch, heads, length, size) in groups."""
        if mask.shape[1] == shape[1]:
            return mask.reshape((mask.shape[0], key_heads, -1, mask.shape[-1]))
        if mask.shape[2] == 1:
            return mask
        return self.tile(mask, (1, 1, shape[1] // key_heads, 1))


class SoftCap(nn.Cell):
    """``limit * tanh(x / limit)``."""

    def __init__(self, limit: float):
        super().__init__()
        self.limit = limit
        self.tanh = tanh()

    def construct(self, x: Tensor) -> Tensor:
        return self.tanh(x * (1.0 / self.limit)) * self.limit


def lowest(dtype: ms.Type) -> float:
    """What is added to the scores of positions that are not seen."""
    # Half of float16's range: the whole, plus a negative score, would be -inf, and a row of it NaN.
    return -32752.0 if dtype == ms.float16 else -3.3895314e38


def with_past(mask: Tensor, count: int) -> Tensor:
    """A mask of ``Attention`` for keys in front of which ``count`` more stand, which every query sees."""
    if mask.ndim == 2:
        return behind_past(mask, count)
    return ops.concat((ops.zeros((*mask.shape[:3], count), mask.dtype), mask), -1)


class AdditiveMask(nn.Cell):
    """Turns an attention mask into the one that ``Attention`` takes."""

    def __init__(self, heads: int):
        super().__init__()
        self.heads = heads
        self.expand = on_cpu() and not kernels_on()
        self.tile = ops.Tile()
        self.rules = MaskRules(causal=False) if kernels_on() else None

    def construct(self, mask: Tensor, queries: int, dtype: ms.Type) -> Tensor:
        """Return what ``Attention`` takes.

        Args:
            mask: (batch, keys), (batch, queries, keys) or (batch, 1 or heads, 1 or queries, keys), 1 for
                attend and 0 for not; a four-axis mask of floats is taken to be additive already.
            queries: the number of query positions.
            dtype: the dtype of the scores.

        Returns:
            Tensor that broadcasts to (batch, heads, queries, keys); a description, if there are kernels, of
            (batch, keys) for float32.
        """
        if self.rules is not None and mask.ndim == 2 and dtype == ms.float32:
            return self.rules(mask)
        additive = mask.ndim == 4 and mask.dtype in FLOATS
        if mask.ndim == 2:
            mask = mask.reshape((mask.shape[0], 1, 1, mask.shape[1]))
        elif mask.ndim == 3:
            mask = mask.reshape((mask.shape[0], 1, mask.shape[1], mask.shape[2]))
        if not additive:
            mask = (1.0 - mask.astype(ms.float32)) * lowest(dtype)
        mask = mask.astype(dtype)
        if self.expand:  # once here, rather than a broadcast that keeps its buffers in every layer
            mask = self.tile(mask, (1, self.heads // mask.shape[1], queries // mask.shape[2], 1))
        return mask
