"""Models whose linear layers keep their weights in int8."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from functools import partial

import mindspore as ms
from mindspore import nn

from mindpeft.cells import put_cell
from mindpeft.convert.loader import parameter_places
from mindpeft.convert.tensors import LazyTensor, RawTensor, dtype_name
from mindpeft.errors import InputError
from mindpeft.nn import Linear
from mindpeft.nn.int8 import Int8Linear
from mindpeft.ops.cpu import kernels_on

INT8 = "int8"  # what users call it


def check_int8() -> None:
    """Raise ``InputError`` where there are no products with weights of int8."""
    if not kernels_on():
        raise InputError(
            "dtype int8 is for the CPU with mindpeft's kernels, which are not in use here: "
            "`mindpeft info --env` tells why; use bfloat16 or float32"
        )


def use_int8(model: nn.Cell, backbone: str, held: Mapping[str, tuple[int, ...]]) -> dict[str, Int8Linear]:
    """Put `Int8Linear` in the place of a backbone's linear layers; their values are still to come.

    Heads stay as they are, and so do a weight that stands in several places and one that the checkpoint
    doesn't hold.

    Args:
        model: with no values yet.
        backbone: the attribute of the model that holds it; a model without it is one.
        held: the shapes of what the checkpoint holds, by the parameters' places in the model.

    Returns:
        The new layers by the names of their weights.

    Raises:
        InputError: there are none.
    """
    prefix = f"{backbone}." if backbone in model.name_cells() else ""
    places = Counter(map(id, parameter_places(model).values()))
    chosen = {
        path: cell
        for path, cell in model.cells_and_names()
        if type(cell) is Linear
        and path.startswith(prefix)
        and places[id(cell.weight)] == 1
        and held.get(f"{path}.weight") == tuple(cell.weight.shape)
    }
    if not chosen:
        raise InputError(
            f"{type(model).__name__} has no linear layers that int8 is for; GPT-2's are of another kind: "
            "use bfloat16 or float32"
        )
    return {f"{path}.weight": _replaced(model, path, cell) for path, cell in chosen.items()}


def _replaced(model: nn.Cell, path: str, cell: Linear) -> Int8Linear:
    new = Int8Linear(cell)
    new.weight.name = cell.weight.name
    new.scale.name = f"{cell.weight.name.removesuffix('weight')}scale"
    parent, _, child = path.rpartition(".")
    put_cell(dict(model.cells_and_names())[parent], child, new)
    return new


def has_int8(model: nn.Cell) -> bool:
    """Whether a model has such layers."""
    return any(isinstance(cell, Int8Linear) for _, cell in model.cells_and_names())


def int8_tensors(model: nn.Cell, dtype: ms.Type | None) -> dict[int, LazyTensor | None]:
    """What is written for the weights and scales of a model's `Int8Linear` layers, by their ids.

    That is the weight in ``dtype`` for a weight, and nothing for its scale.
    """
    found: dict[int, LazyTensor | None] = {}
    for _, cell in model.cells_and_names():
        if isinstance(cell, Int8Linear):
            target, shape = dtype_name(dtype), tuple(cell.weight.shape)
            found[id(cell.weight)] = LazyTensor(target, shape, partial(_raw, cell, target))
            found[id(cell.scale)] = None
    return found


def _raw(cell: Int8Linear, target: str) -> RawTensor:
    return RawTensor.from_numpy(cell.read()).astype(target)
