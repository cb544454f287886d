"""In which precision a model's numbers are kept, and in which it computes."""

from __future__ import annotations

from collections.abc import Collection

import mindspore as ms
from mindspore import Parameter, nn

from mindpeft.convert.loader import parameter_places
from mindpeft.nn import Conv1D, Embedding, Linear
from mindpeft.ops.attention import FLOATS
from mindpeft.ops.cpu.library import Kernel
from mindpeft.ops.device import on_cpu

_MATRIX_CELLS = (Linear, Conv1D, Embedding)


def parameter_dtypes(model: nn.Cell, dtype: ms.Type, held: Collection[str]) -> dict[str, ms.Type]:
    """The dtypes of a model's parameters, by their places in it, for a checkpoint that is about to be loaded.

    All of them get ``dtype``; but on the CPU, which has no arithmetic of bfloat16, that is a way to store
    matrices alone: what passes between the layers, norms, biases and what the checkpoint does not hold (a
    fresh head) are float32 there.

    Args:
        held: the parameters that the checkpoint holds.
    """
    places = parameter_places(model)
    if not needs_widening(dtype):
        return dict.fromkeys(places, dtype)
    matrices = _matrices(model)
    narrow = {id(place) for name, place in places.items() if name in held and id(place) in matrices}
    return {name: dtype if id(place) in narrow else ms.float32 for name, place in places.items()}


def _matrices(model: nn.Cell) -> set[int]:
    cells = (cell for _, cell in model.cells_and_names() if isinstance(cell, _MATRIX_CELLS))
    return {id(cell.weight) for cell in cells}


def computing_dtype(model: nn.Cell) -> ms.Type:
    """The dtype of what passes between a model's layers."""
    dtype = next(parameter.dtype for parameter in model.get_parameters() if parameter.dtype in FLOATS)
    return ms.float32 if needs_widening(dtype) else dtype


def keep_less(model: nn.Cell) -> None:
    """Keep what the backward pass needs of a model's layers in bfloat16, where kernels know how to."""
    for _, cell in list(model.cells_and_names()):
        for name, child in list(cell.name_cells().items()):
            if isinstance(child, Kernel):
                setattr(cell, name, child.keeping_less())


def needs_widening(dtype: ms.Type) -> bool:
    """Whether the device keeps numbers of a dtype without computing in it."""
    return on_cpu() and dtype == ms.bfloat16


def widen(parameter: Parameter) -> bool:
    """Keep a parameter in float32 if the device can't compute in its dtype; return whether it has changed."""
    if not needs_widening(parameter.dtype):
        return False
    parameter.set_dtype(ms.float32)
    return True
