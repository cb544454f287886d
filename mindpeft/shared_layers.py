"""Equal layers of a model compiled once.

MindSpore infers types and differentiates each Cell by itself: 24 equal layers cost it 24 times what one does.
Cells that bear the same ``cell_init_args`` share one graph, in which each has its own parameters, until it is
inlined. Python values that ``construct`` reads become constants of that graph. So two layers may share it
only if all that they hold is equal but the values of parameters, which is what `structure` tells.
"""

from __future__ import annotations

import hashlib
import os
import types
from collections import defaultdict
from typing import Any

import mindspore as ms
import numpy as np
from mindspore import Parameter, Tensor, nn, ops

SWITCH = "MINDPEFT_SHARE_LAYERS"
# The prefix by which MindSpore knows such a Cell.
_PREFIX = "lazy_inline_"
_MOST_NUMBERS = 1 << 20  # of a constant that is compared by value, not by who it is
# What MindSpore notes in Cells and operators about their place and their compilations.
_BOOKKEEPING = frozenset(
    {
        *("_create_time", "_id", "_param_prefix", "_scope", "_phase", "_compile_phase", "_phase_cache"),
        *("arguments_key", "_compile_cache", "_compiled", "_exist_objs", "_exist_names", "_params_list"),
        *("_init_flag", "_is_check_and_refresh", "_lazy_construct_sig", "_lazy_user_parameters"),
        *("is_top_cell", "requires_grad", "_auto_prefix", "_jit_graph_name", "instance_name"),
        *("_cells", "_params"),  # told apart from the rest
    }
)


class SharedLayers:
    """What `mark` has marked shares its graphs inside a ``with`` block.

    Attributes:
        used: whether a model was marked.
    """

    def __init__(self) -> None:
        self.used = False
        self._marked: list[nn.Cell] = []

    def __enter__(self) -> SharedLayers:
        return self

    def __exit__(self, *_: object) -> None:
        for cell in self._marked:
            del cell._cell_init_args, cell.no_inline

    def mark(self, model: nn.Cell) -> None:
        """Let equal members of each ``CellList`` in a model share one graph, unless the switch is off."""
        self.used = True
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


def structure(cell: nn.Cell) -> str:
    """A text that two Cells have in common if they compute the same but for their parameters' values."""
    return hashlib.sha256(repr(_of_cell(cell, {})).encode()).hexdigest()


def _of_cell(cell: nn.Cell, seen: dict[int, int]) -> tuple:
    """All about a Cell that a graph may depend on, as nested tuples.

    Args:
        seen: id of a Cell or parameter that was met -> its number, for those that stand in several places.
    """
    if id(cell) in seen:
        return "again", seen[id(cell)]
    seen[id(cell)] = len(seen)
    parameters = [(name, _of_parameter(value, seen)) for name, value in cell._params.items()]
    children = [(name, child and _of_cell(child, seen)) for name, child in cell._cells.items()]
    unread = _BOOKKEEPING.union(getattr(cell, "NOT_IN_GRAPH", ()))
    rest = {name: value for name, value in vars(cell).items() if name not in unread}
    return _of_class(cell), parameters, children, _of_value(rest)


def _of_parameter(parameter: Parameter | None, seen: dict[int, int]) -> tuple | None:
    if parameter is None:
        return None
    if id(parameter) in seen:
        return "again", seen[id(parameter)]
    seen[id(parameter)] = len(seen)
    return tuple(parameter.shape), str(parameter.dtype), parameter.requires_grad


def _of_value(value: Any) -> tuple:
    """The same about a value that is no child.

    Of Cells and parameters that stand elsewhere it tells which they are: a shared graph would read those of
    one layer for all.
    """
    if value is None or isinstance(value, bool | int | float | str | bytes | ms.Type | np.dtype):
        return type(value).__name__, repr(value)
    if isinstance(value, Tensor | np.ndarray) and not isinstance(value, Parameter):
        return _of_numbers(value)
    if isinstance(value, ops.Primitive):
        return _of_class(value), _of_value({k: v for k, v in vars(value).items() if k not in _BOOKKEEPING})
    if isinstance(value, dict):
        return "dict", [(repr(key), _of_value(item)) for key, item in value.items()]
    if isinstance(value, list | tuple):
        return type(value).__name__, [_of_value(item) for item in value]
    if isinstance(value, types.FunctionType):
        holds = [place.cell_contents for place in value.__closure__ or ()]
        return "function", id(value.__code__), _of_value([value.__defaults__, holds])
    return _of_class(value), id(value)


def _of_class(value: Any) -> tuple[str, int]:
    return type(value).__qualname__, id(type(value))


def _of_numbers(value: Tensor | np.ndarray) -> tuple:
    if value.size > _MOST_NUMBERS:
        return "numbers", id(value)
    array = np.ascontiguousarray(value if isinstance(value, np.ndarray) else value.asnumpy())
    return "numbers", array.shape, str(value.dtype), array.tobytes()
