"""Attention that never holds all scores (see ``src/attention.cpp``)."""

from __future__ import annotations

from mindspore import ops

from mindpeft.ops.cpu.dropout import NO_NOISE
from mindpeft.ops.cpu.library import Kernel, kernel, setting


def _mixed(q: list[int], k: list[int], v: list[int], *_) -> tuple[tuple[int, ...], ...]:
    batch, heads, length, _ = q
    return (batch, length, heads * v[-1]), (batch, heads, length)


def _mixed_only(q: list[int], k: list[int], v: list[int], *_) -> tuple[int, ...]:
    return _mixed(q, k, v)[0]


def _inputs(q: list[int], k: list[int], v: list[int], *_) -> tuple[list[int], ...]:
    return q, k, v


class AttentionKernel(Kernel):
    """``(out, logs)``: q (batch, heads, length, size), k and v (batch, key heads, keys, size),
    noise of `mindpeft.ops.cpu.dropout.Noise`.

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

    def construct(self, q, k, v, noise):
        return self.forward(q, k, v, self.settings, noise)

    def bprop(self, q, k, v, noise, out, dout):
        dq, dk, dv = self.backward(q, k, v, self.settings, noise, out[0], out[1], dout[0])
        return dq, dk, dv, ops.zeros_like(noise)


class MaskedAttentionKernel(Kernel):
    """The same with a mask that is added to the scores and gets no gradient.

    Each of its axes but the last, (batch, heads, length, keys), may be of size 1.
    """

    def __init__(self, scale: float, softcap: float):
        super().__init__()
        self.settings = setting(scale, softcap)
        self.forward = kernel("masked_attention", _mixed, 2)
        self.backward = kernel("masked_attention_grad", _inputs, 3)

    def construct(self, q, k, v, mask, noise):
        return self.forward(q, k, v, mask, self.settings, noise)

    def bprop(self, q, k, v, mask, noise, out, dout):
        dq, dk, dv = self.backward(q, k, v, mask, self.settings, noise, out[0], out[1], dout[0])
        return dq, dk, dv, ops.zeros_like(mask), ops.zeros_like(noise)


class CachedAttentionKernel(Kernel):
    """Attention that first puts keys and values into caches, (batch * key heads * room, size).

    The kernel writes to the caches unknown to MindSpore: for an operator that it knows to write, it copies
    every parameter that a graph reads both before and after (a tied embedding, twice, for each token).

    Args:
        scale, softcap: as for `AttentionKernel`.
    """

    def __init__(self, scale: float, softcap: float):
        super().__init__()
        self.settings = setting(scale, softcap)
        self.silence = setting(*NO_NOISE)
        self.first = kernel("attention_beginning_cache", _mixed_only)
        self.later = kernel("attention_with_cache", _mixed_only)

    def construct(self, q, k, v, mask, keys, values, place=None):
        """
        Args:
            q, k, v: of the new tokens.
            mask: of those, or, with ``place``, of all that the caches have room for.
            keys, values: the caches.
            place: (1,) int32, of the first token; None for the beginning.
        """
        if place is None:
            return self.first(q, k, v, mask, self.settings, self.silence, keys, values)
        return self.later(q, k, v, mask, self.settings, self.silence, keys, values, place)
