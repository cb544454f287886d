"""Splitting rows into heads, with a rotary position embedding or without, and merging them again."""

from __future__ import annotations

from mindspore import ops

from mindpeft.ops.cpu.library import Kernel, kernel


def _apart(heads: int):
    return lambda x, *_: (x[0], heads, x[1], x[2] // heads)


def _joined(x: list[int], *_) -> tuple[int, ...]:
    return x[0], x[2], x[1] * x[3]


class SplitHeadsKernel(Kernel):
    """(batch, length, heads * size) to (batch, heads, length, size)."""

    def __init__(self, heads: int):
        super().__init__()
        backward = kernel("merge_heads", _joined)

        def gradients(x, out, dout):
            return (backward(dout),)

        self.forward = kernel("split_heads", _apart(heads), gradients=gradients, heads=heads)

    def construct(self, x):
        return self.forward(x)


class SplitAndTurnKernel(Kernel):
    """The same, each head turned by cosines and sines (batch, 1 or more, length, columns to turn)."""

    def __init__(self, heads: int, interleaved: bool):
        super().__init__()
        name = "split_and_turn_neighbours" if interleaved else "split_and_turn"
        backward = kernel(f"{name}_grad", _joined)

        def gradients(x, cos, sin, out, dout):
            return backward(dout, cos, sin), ops.zeros_like(cos), ops.zeros_like(sin)

        self.forward = kernel(name, _apart(heads), gradients=gradients, heads=heads)

    def construct(self, x, cos, sin):
        return self.forward(x, cos, sin)


class MergeHeadsKernel(Kernel):
    """(batch, heads, length, size) to (batch, length, heads * size)."""

    def __init__(self, heads: int):
        super().__init__()
        backward = kernel("split_heads", _apart(heads), heads=heads)

        def gradients(x, out, dout):
            return (backward(dout),)

        self.forward = kernel("merge_heads", _joined, gradients=gradients, heads=heads)

    def construct(self, x):
        return self.forward(x)
