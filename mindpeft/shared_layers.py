"""Equal layers of a model compiled once.

MindSpore infers types and differentiates each Cell by itself: 24 equal layers cost it 24 times what one does.
Cells that bear the same ``cell_init_args`` share one graph, in which each has its own parameters, until it is
inlined. Python values that ``construct`` reads become constants of that graph. So two layers may share it
only if all that they hold is equal but the values of parameters: see `mindpeft.structure`.
"""

from __future__ import annotations

import os
from collections import defaultdict

from mindspore import nn

from mindpeft.structure import structure

SWITCH = "MINDPEFT_SHARE_LAYERS"
# The prefix by which MindSpore knows such a Cell.
_PREFIX = "lazy_inline_"


class SharedLayers:
    """What `mark` has marked shares its graphs inside a ``with`` block."""

    def __init__(self) -> None:
        self._marked: list[nn.Cell] = []

    def __enter__(self) -> SharedLayers:
        return self

    def __exit__(self, *_: object) -> None:
        for cell in self._marked:
            del cell._cell_init_args, cell.no_inline

    def mark(self, model: nn.Cell) -> None:
        """Let equal members of each ``CellList`` in a model share one graph, unless the switch is off."""
        if os.environ.get(SWITCH, "1") == "0":
            return
        for key, cells in _equal(model):
            for cell in cells:
                cell.cell_init_args = _PREFIX + key
                cell.no_inline = False  # into the rest, once it has been differentiated
            self._marked += cells


def _equal(model: nn.Cell) -> list[tuple[str, list[nn.Cell]]]:
    """Groups of two and more equal layers, by their structure."""
    groups: dict[str, list[nn.Cell]] = defaultdict(list)
    for _, cells in model.cells_and_names():
        if isinstance(cells, nn.CellList):
            for cell in cells:
                groups[structure(cell)].append(cell)
    return [(key, cells) for key, cells in groups.items() if len(cells) > 1]
