"""Putting one cell in another's place."""

from __future__ import annotations

from mindspore import nn


def put_cell(parent: nn.Cell, child: str, cell: nn.Cell) -> None:
    """Put a cell at an attribute, or a number, of its parent.

    MindSpore then renames the parameters under it; the names are put back.
    """
    names = [(parameter, parameter.name) for parameter in cell.get_parameters()]
    if isinstance(parent, nn.SequentialCell | nn.CellList):
        parent[int(child)] = cell
    else:
        setattr(parent, child, cell)
    for parameter, name in names:
        parameter.name = name
