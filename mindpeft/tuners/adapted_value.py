"""A cell that computes with another value than its parameter's own, its code left as it is.

The cell's class becomes a subclass of itself in which the attribute is what was made of the parameter, in
graphs as well. ``mindpeft.parameters.Place`` goes on knowing the parameter itself.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import mindspore as ms
from mindspore import nn

_ADAPTED = "adapted_"  # + the attribute: where a cell keeps what is made of its parameter


class AdaptedValue(nn.Cell):
    """What several cells, one after the other, make of a parameter's value."""

    def __init__(self) -> None:
        super().__init__(auto_prefix=False)
        self.deltas = nn.CellList(auto_prefix=False)

    def construct(self, weight: ms.Tensor) -> ms.Tensor:
        for delta in self.deltas:
            weight = delta(weight)
        return weight


class AdaptedAttribute(property):
    """The attribute of such a cell.

    Graphs are made of the getter; without one it runs at every access. Elsewhere it would compile a graph of
    its own, so who looks at the attribute while graphs are in use sees the parameter.
    """

    def __init__(self, attribute: str) -> None:
        name = _ADAPTED + attribute

        def read(self):
            return getattr(self, name)(self._params[attribute])

        super().__init__(read)
        self.attribute = attribute

    def __get__(self, cell: nn.Cell | None, owner: type | None = None) -> Any:
        if cell is not None and ms.get_context("mode") == ms.GRAPH_MODE:
            return cell._params[self.attribute]
        return super().__get__(cell, owner)


@cache
def _adapted_class(kind: type[nn.Cell], attributes: tuple[str, ...]) -> type[nn.Cell]:
    """A subclass of a cell's class that computes with the adapted values of some attributes."""
    members = {"__module__": kind.__module__, "__doc__": kind.__doc__, "ADAPTED": attributes}
    return type(kind.__name__, (kind,), members | {name: AdaptedAttribute(name) for name in attributes})


def adapt(cell: nn.Cell, attribute: str, delta: nn.Cell) -> None:
    """Have a cell compute with what ``delta``, called with a parameter's value, makes of it."""
    attributes = vars(type(cell)).get("ADAPTED", ())
    if attribute not in attributes:
        # No child of the cell: the delta's parameters are those of the layer around it.
        object.__setattr__(cell, _ADAPTED + attribute, AdaptedValue())
        kind = type(cell).__base__ if attributes else type(cell)
        cell.__class__ = _adapted_class(kind, (*attributes, attribute))
    vars(cell)[_ADAPTED + attribute].deltas.append(delta)


def is_adapted(cell: nn.Cell) -> bool:
    """Whether a cell computes with other values than its parameters' own."""
    return "ADAPTED" in vars(type(cell))


def restore(cell: nn.Cell) -> None:
    """Give a cell its own class back."""
    if is_adapted(cell):
        for attribute in type(cell).ADAPTED:
            object.__delattr__(cell, _ADAPTED + attribute)
        cell.__class__ = type(cell).__base__
