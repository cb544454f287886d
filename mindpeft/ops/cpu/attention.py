"""Attention that never holds all scores (see ``src/attention.cpp``)."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import mindspore as ms
from mindspore import Tensor, ops

from mindpeft.ops.cpu.dropout import NO_NOISE
from mindpeft.ops.cpu.library import Kernel, kernel, must_fit, setting

Shape = Sequence[int]
_KEYS_AT_ONCE = 256  # kKeys of src/attention.h; of no more keys the backward pass needs no output


def _mixed(q: Shape, k: Shape, v: Shape, *_) -> tuple[Shape, ...]:
    batch, heads, length, _ = q
    must_fit(q, k)
    if (k[0], k[0], k[1], k[2]) != (batch, *v[:3]) or heads % k[1]:
        raise ValueError(f"queries {tuple(q)}, keys {tuple(k)} and values {tuple(v)} don't fit each other")
    return (batch, length, heads * v[-1]), (2, batch, heads, length)


def _mixed_and_kept(q: Shape, k: Shape, v: Shape, *_) -> tuple[Shape, ...]:
    out, logs = _mixed(q, k, v)
    return out, logs, q, k, v, out if k[2] > _KEYS_AT_ONCE else (1,)


def _mixed_only(q: Shape, k: Shape, v: Shape, *_) -> Shape:
    return _mixed(q, k, v)[0]


def _inputs(q: Shape, k: Shape, v: Shape, *_) -> tuple[Shape, ...]:
    return q, k, v


def _needed(out: tuple[Tensor, ...], k: Tensor, less: bool) -> Tensor:
    """What stands for the output in the backward pass: what is kept anyway, where that is not read."""
    if less:
        return out[5]
    return out[0] if k.shape[2] > _KEYS_AT_ONCE else out[1]


def _forward(name: str, gradients: Callable, less: bool) -> ops.Custom:
    """The operator of attention."""
    return kernel(name, _mixed_and_kept if less else _mixed, 2, gradients, 4 * less)


class AttentionKernel(Kernel):
    """``(out, logs)``: q (batch, heads, length, size), k and v (batch, key heads, keys, size),
    noise of `mindpeft.ops.cpu.dropout.Noise`.

    out is (batch, length, heads * size); logs (2, batch, heads, length) is for the backward pass.

    Args:
        scale: of the scores.
        softcap: their bound, 0 for none.
        less: keep q, k, v and, of many keys, out for the backward pass in bfloat16, as four more outputs.
    """

    def __init__(self, scale: float, softcap: float, less: bool = False):
        super().__init__()
        self.scale, self.softcap, self.less = scale, softcap, less
        self.settings = setting(scale, softcap)
        backward = kernel("attention_grad", _inputs, 3)

        def gradients(q, k, v, settings, noise, out, dout):
            mixed = _needed(out, k, less)
            q, k, v = out[2:5] if less else (q, k, v)
            dq, dk, dv = backward(q, k, v, settings, noise, mixed, out[1], dout[0])
            return dq, dk, dv, ops.zeros_like(settings), ops.zeros_like(noise)

        self.forward = _forward("attention", gradients, less)

    def construct(self, q, k, v, noise):
        return self.forward(q, k, v, self.settings, noise)

    def keeping_less(self) -> AttentionKernel:
        return AttentionKernel(self.scale, self.softcap, less=True)


class MaskedAttentionKernel(Kernel):
    """The same with a mask that gets no gradient.

    It is added to the scores, and each of its axes but the last, (batch, heads, length, keys), may be of size
    1; or it is a description, of `MaskRules`.
    """

    def __init__(self, scale: float, softcap: float, less: bool = False):
        super().__init__()
        self.scale, self.softcap, self.less = scale, softcap, less
        self.settings = setting(scale, softcap)
        backward = kernel("masked_attention_grad", _inputs, 3)

        def gradients(q, k, v, mask, settings, noise, out, dout):
            mixed = _needed(out, k, less)
            q, k, v = out[2:5] if less else (q, k, v)
            dq, dk, dv = backward(q, k, v, mask, settings, noise, mixed, out[1], dout[0])
            return dq, dk, dv, ops.zeros_like(mask), ops.zeros_like(settings), ops.zeros_like(noise)

        self.forward = _forward("masked_attention", gradients, less)

    def construct(self, q, k, v, mask, noise):
        return self.forward(q, k, v, mask, self.settings, noise)

    def keeping_less(self) -> MaskedAttentionKernel:
        return MaskedAttentionKernel(self.scale, self.softcap, less=True)


class MaskRules(Kernel):
    """Describes a mask, so that there is no number for each pair of tokens: (1 or batch, 5 or 5 + keys).

    Args:
        causal: a query sees no key behind it, and of the others those of its own sample; a query without a
            sample sees them all.
        window: how many keys it sees, itself included; None for all. For causal masks.
        alibi: a key's place, counted over the keys of samples, adds to its scores times the head's slope.
    """

    def __init__(self, causal: bool, window: int | None = None, alibi: bool = False):
        super().__init__()
        self.before, self.behind = setting(causal), setting(window or 0, alibi, 0)
        self.beginning = setting(0)
        self.concat, self.beside, self.tile = ops.Concat(0), ops.Concat(1), ops.Tile()

    def construct(self, samples: Tensor | None, first: Tensor | None = None) -> Tensor:
        """
        Args:
            samples: (batch, keys), 0 for keys that nobody sees, the number of the sample for others; None if
                all are seen.
            first: (1,), the place of the first query among the keys; None for the beginning.
        """
        first = self.beginning if first is None else first.astype(ms.float32)
        rules = self.concat((self.before, first, self.behind)).reshape((1, -1))
        if samples is None:
            return rules
        return self.beside((self.tile(rules, (samples.shape[0], 1)), samples.astype(ms.float32)))


def behind_past(rules: Tensor, count: int) -> Tensor:
    """A description of `MaskRules` for keys in front of which `count` more stand, which every query sees."""
    return ops.concat((rules[:, :4], rules[:, 4:5] + count, rules[:, 5:]), 1)


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
