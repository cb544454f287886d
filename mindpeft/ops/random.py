"""Random numbers inside a graph."""

from __future__ import annotations

import itertools
from typing import ClassVar

import numpy as np
from mindspore import Tensor, nn, ops

from mindpeft.hidden_parameters import hide

_numbers = itertools.count(1)


def standard_normal() -> ops.StandardNormal:
    """The operator of random numbers, which on the CPU repeats them for a seed.

    With gradient checkpointing its numbers are kept: drawn again they would be others, and the backward pass
    would not be that of the forward pass.
    """
    operator = ops.StandardNormal()
    operator.add_prim_attr("recompute", False)
    return operator


class SaltedCell(nn.Cell):
    """A Cell that draws random numbers, which its salt tells apart from those of others.

    Were operators seeded apart, equal layers would not be equal: no graph could stand for all of them.

    Attributes:
        normal: the operator of random numbers, or None if there is nothing to draw.
        salt: two numbers in [0, 1), if there is something to draw.
    """

    HIDDEN: ClassVar[tuple[str, ...]] = ("salt",)

    def __init__(self, random: bool):
        super().__init__()
        self.normal = standard_normal() if random else None
        if random:
            number = next(_numbers)
            hide(self, "salt", _salt(0, number), f"salt.{number}")

    def reseed(self, seed: int, number: int) -> None:
        """Draw what ``seed`` fixes from now on, other numbers than a Cell of another ``number``."""
        self.normal.add_prim_attr("seed", seed % 2**31)
        self.normal.add_prim_attr("seed2", 1)
        self.salt.name = f"salt.of.seed.{number}"
        self.salt.set_data(_salt(seed, number))


def _salt(seed: int, number: int) -> Tensor:
    return Tensor(np.random.default_rng((seed % 2**31, number)).random(2, np.float32))
