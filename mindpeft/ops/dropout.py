"""Dropout."""

from __future__ import annotations

import math

import mindspore as ms
import mindspore.nn as nn
import numpy as np
from mindspore import Tensor, ops

from mindpeft.ops.cpu import kernels_on
from mindpeft.ops.cpu.dropout import DropoutKernel, Noise
from mindpeft.ops.device import on_cpu
from mindpeft.ops.random import SaltedCell

_SEED_ATTRIBUTES = (("Seed0", "Seed1"), ("seed", "seed2"))  # of ops.Dropout and of ops.StandardNormal
_WIDEST = 256  # elements of a block
_UNIFORM = Tensor(np.random.default_rng(0).random(4096 * _WIDEST, np.float32))


class CpuDropout(SaltedCell):
    """Dropout (Srivastava et al., 2014) for the CPU: one seed gives the same masks in every run.

    The built-in operator there does not repeat itself: its masks differ between runs of one seed from about
    the sixth call on. StandardNormal does repeat, but takes 20 ns a number. So it only draws, for each block
    of up to 256 elements, which row of a fixed table of uniform numbers decides what is dropped.
    """

    def __init__(self, p: float):
        super().__init__(random=p > 0.0)
        self.p = p
        self.scale = 1.0 / (1.0 - p)

    def construct(self, x: Tensor) -> Tensor:
        if not self.training or self.p == 0.0:
            return x
        width = math.gcd(x.size, _WIDEST)
        table = _UNIFORM.reshape((-1, width))
        chance = (ops.erf(self.normal((x.size // width,)) * math.sqrt(0.5)) + 1.0) * 0.5  # uniform in [0, 1]
        chance = chance + self.salt[0]
        chance = chance - ops.floor(chance)
        rows = ops.minimum((chance * table.shape[0]).astype(ms.int32), table.shape[0] - 1)
        kept = (ops.gather(table, rows, 0).reshape(x.shape) >= self.p).astype(x.dtype)
        return x * (kept * self.scale)


class FastDropout(nn.Cell):
    """Dropout by its kernel where the numbers are float32.

    Args:
        p: the share set to zero in training.
        plain: the Cell for other numbers.
    """

    def __init__(self, p: float, plain: nn.Cell):
        super().__init__()
        self.p = p
        self.noise, self.kernel, self.plain = Noise(p), DropoutKernel(), plain

    def construct(self, x: Tensor) -> Tensor:
        if not self.training or self.p == 0.0:
            return x
        if self.kernel is None or x.dtype != ms.float32:
            return self.plain(x)
        return self.kernel(x, self.noise())


def dropout(p: float) -> nn.Cell:
    """Return the Cell that zeroes elements with probability ``p`` in training, for the current device."""
    plain = CpuDropout(p) if on_cpu() and p < 1.0 else nn.Dropout(p=p)
    return FastDropout(p, plain) if kernels_on() and p < 1.0 else plain


def seed_dropout(model: nn.Cell, seed: int) -> None:
    """Give each dropout of ``model`` a seed of its own, fixed by ``seed``, for graphs compiled from now on.

    MindSpore gives an operator its seed when it is made: without new seeds a run would depend on what the
    process did before.
    """
    number = 0
    for _, cell in model.cells_and_names():
        if isinstance(cell, SaltedCell):
            if cell.normal is not None:
                number += 1
                cell.reseed(seed, number)
            continue
        for operator in vars(cell).get("_primitives", {}).values():
            for first, second in _SEED_ATTRIBUTES:
                if operator is not None and first in operator.attrs and second in operator.attrs:
                    number += 1
                    operator.add_prim_attr(first, seed % 2**31)
                    operator.add_prim_attr(second, number)
