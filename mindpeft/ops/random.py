"""Random numbers inside a graph."""

from __future__ import annotations

import itertools

import numpy as np
from mindspore import Parameter, Tensor, nn, ops

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

    Were operators seeded apart, equal layers would not be equal: no graph could stand for all of them
    (`mindpeft.shared_layers`). A parameter may differ. It is no parameter of the model, though, which neither
    trains nor saves it: a graph takes it in by `Salts`.

    Attributes:
        normal: the operator of random numbers, or None if there is nothing to draw.
        salt: two numbers in [0, 1).
    """

    NOT_IN_GRAPH = ("salt",)  # seen as a parameter, while a graph is made

    def __init__(self, random: bool):
        super().__init__()
        self.normal = standard_normal() if random else None
        number = next(_numbers)
        vars(self)["salt"] = Parameter(_salt(0, number), name=f"salt.{number}", requires_grad=False)

    def reseed(self, seed: int, number: int) -> None:
        """Draw what ``seed`` fixes from now on, other numbers than a Cell of another ``number``."""
        self.normal.add_prim_attr("seed", seed % 2**31)
        self.normal.add_prim_attr("seed2", 1)
        self.salt.name = f"salt.of.seed.{number}"
        self.salt.set_data(_salt(seed, number))


def _salt(seed: int, number: int) -> Tensor:
    return Tensor(np.random.default_rng((seed % 2**31, number)).random(2, np.float32))


class Salts:
    """Inside a ``with`` block salts are parameters of the Cells that `show` has been given."""

    def __init__(self) -> None:
        self._shown: list[SaltedCell] = []

    def __enter__(self) -> Salts:
        return self

    def __exit__(self, *_: object) -> None:
        for cell in self._shown:
            cell._params.pop("salt", None)

    def show(self, model: nn.Cell) -> None:
        """Let the graph that is made of a model have its salts."""
        for _, cell in model.cells_and_names():
            if isinstance(cell, SaltedCell) and cell.normal is not None:
                cell._params["salt"] = cell.salt
                self._shown.append(cell)
