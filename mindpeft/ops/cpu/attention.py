"""Attention that never holds all scores (see ``src/attention.cpp``)."""

from __future__ import annotations

import mindspore.nn as nn
from mindspore import ops

from mindpeft.ops.cpu.library import kernel, setting


def _mixed(q: list[int], k: list[int], v: list[int], *_) -> tuple[tuple[int, ...], ...]:
    batch, heads, length, _ = q
    return (batch, length, heads * v[-1]), (batch, heads, length)


def _inputs(q: list[int], k: list[int], v: list[int], *_) -> tuple[list[int], ...]:
    return q, k, v


class AttentionKernel(nn.Cell):
    """``(out, logs)``: q (batch, heads, length, size), k and v (batch, key heads, keys, size).

    out is (batch, length, heads * size); logs (batch, heads, length) is for the backward pass.

    Args:
        scale: of the scores.
        softcap: their bound, 0 for none.
    """

    def __init__(self, scale: float, softcap: float):
        super().__init__()
        self.settings = setting(scale, softcap)
        self.forward = kernel("attention", _mixed, 2)
        self.backward = kernel("attention_grad", _inputs, 3)

    def construct(self, q, k, v):
        return self.forward(q, k, v, self.settings)

    def bprop(self, q, k, v, out, dout):
        return self.backward(q, k, v, self.settings, out[0], out[1], dout[0])


class MaskedAttentionKernel(nn.Cell):
    """The same with a mask that is added to the scores and gets no gradient.

    Each of its axes but the last, (batch, heads, length, keys), may be of size 1.
    """

    def __init__(self, scale: float, softcap: float):
        super().__init__()
        self.settings = setting(scale, softcap)
        self.forward = kernel("masked_attention", _mixed, 2)
        self.backward = kernel("masked_attention_grad", _inputs, 3)

    def construct(self, q, k, v, mask):
        return self.forward(q, k, v, mask, self.settings)

    def bprop(self, q, k, v, mask, out, dout):
        dq, dk, dv = self.backward(q, k, v, mask, self.settings, out[0], out[1], dout[0])
        return dq, dk, dv, ops.zeros_like(mask)
