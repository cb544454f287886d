"""What every injected layer shares: the wrapped cell, its active slot, and the arithmetic helpers.

A `TunerLayer` owns the original cell (`base_layer`) and ONE set of adapter tensors, the active slot, whose
names are the adapter file's names. Which adapter sits in the slot is a matter of parameter values alone, so a
compiled graph never depends on an adapter's name, rank (up to the slot's) or alpha.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import mindspore as ms
import numpy as np
from mindspore import nn

from mindpeft.errors import InputError
from mindpeft.parameters import assign

Tensors = dict[str, np.ndarray]  # tensor name -> value on the host, in the adapter's true shape
Shapes = dict[str, tuple[int, ...]]

_LINEAR_CLASSES = frozenset({"Dense", "Linear", "Conv1D"})
_EMBEDDING_CLASSES = frozenset({"Embedding", "EmbeddingExt", "VocabEmbedding"})
_LOW_PRECISION = (ms.float16, ms.bfloat16)


def is_linear(cell: nn.Cell) -> bool:
    """Whether a cell multiplies by a matrix `weight`: `nn.Dense`, `mint.nn.Linear`, ours, or a Conv1D."""
    return _descends_from(cell, _LINEAR_CLASSES) and _matrix(cell, "weight") is not None


def is_embedding(cell: nn.Cell) -> bool:
    """Whether a cell looks rows up in a matrix: `nn.Embedding`, `mint.nn.Embedding` or ours."""
    return _descends_from(cell, _EMBEDDING_CLASSES) and weight_attribute(cell) is not None


def _descends_from(cell: nn.Cell, names: frozenset[str]) -> bool:
    # By name, so that cells of other packages (mindformers' Linear, say) count without importing them.
    return any(cls.__name__ in names for cls in type(cell).__mro__)


def _matrix(cell: nn.Cell, attribute: str) -> ms.Parameter | None:
    parameter = getattr(cell, attribute, None)
    return parameter if isinstance(parameter, ms.Parameter) and parameter.ndim == 2 else None


def weight_attribute(cell: nn.Cell) -> str | None:
    """The attribute that holds a cell's matrix; `nn.Embedding` calls it `embedding_table`."""
    return next((name for name in ("weight", "embedding_table") if _matrix(cell, name) is not None), None)


def is_transposed(cell: nn.Cell) -> bool:
    """Whether a linear cell's weight is (in, out), as in GPT-2's Conv1D, rather than (out, in)."""
    return bool(getattr(cell, "fan_in_fan_out", False)) or _descends_from(cell, frozenset({"Conv1D"}))


def linear_features(cell: nn.Cell) -> tuple[int, int]:
    """A linear cell's (in, out)."""
    first, second = cell.weight.shape
    return (first, second) if is_transposed(cell) else (second, first)


class Slot(nn.Cell):
    """A holder that gives the parameters of a slot dotted names (`lora_A.weight`)."""


class TunerLayer(nn.Cell):
    """A wrapped cell with one active slot. A method derives one subclass per kind of cell.

    Args:
        base_layer: the original cell.
        path: its dotted name in the base model.
        shapes: the slot's tensors and their shapes.
        dtype: the slot's dtype.
    """

    def __init__(self, base_layer: nn.Cell, path: str, shapes: Shapes, dtype: ms.dtype) -> None:
        super().__init__(auto_prefix=False)
        self.base_layer = base_layer
        self.path = path
        self.slot_dtype = dtype
        self.slot_shapes: Shapes = {}
        self.scaling = ms.Parameter(ms.Tensor(0.0, dtype), name=f"{path}.scaling", requires_grad=False)
        self.reserve(shapes)

    # What a method says about an adapter, from the original cell and the config alone ----------------------

    @classmethod
    def tensor_shapes(cls, cell: nn.Cell, config: Any, path: str) -> Shapes:
        """The tensors that an adapter with this config has for `cell`, by their names in the file."""
        raise NotImplementedError

    @classmethod
    def initial_tensors(cls, cell: nn.Cell, config: Any, path: str) -> Tensors:
        """Fresh values of those tensors, from NumPy's global generator (which `mindspore.set_seed` seeds)."""
        raise NotImplementedError

    @classmethod
    def scaling_of(cls, config: Any, path: str) -> float:
        """The factor of the adapter's contribution."""
        raise NotImplementedError

    @classmethod
    def deltas(cls, cell: nn.Cell, tensors: Tensors, scaling: float) -> Tensors:
        """What merging adds to the cell's own parameters, by attribute, in float32."""
        raise NotImplementedError

    def configure(self, config: Any) -> bool:
        """Take over what a config fixes in the graph; return whether that changed the graph."""
        return False

    # The slot ---------------------------------------------------------------------------------------------

    def reserve(self, shapes: Shapes) -> bool:
        """Make room for tensors of these shapes; return whether the slot changed (graphs are then stale)."""
        changed = False
        for name, wanted in shapes.items():
            present = self.slot_shapes.get(name)
            shape = wanted if present is None else tuple(map(max, present, wanted))
            if shape == present:
                continue
            # A new parameter: one whose shape was changed keeps the old shape in MindSpore's depths.
            earlier = None if present is None else self.slot(name)
            value = padded(None if earlier is None else earlier.asnumpy(), shape)
            self._create(name, value, earlier is not None and earlier.requires_grad)
            self.slot_shapes[name] = shape
            changed = True
        return changed

    def _create(self, name: str, value: np.ndarray, trainable: bool) -> None:
        *holders, leaf = name.split(".")
        cell: nn.Cell = self
        for holder in holders:
            if holder not in cell.name_cells():
                setattr(cell, holder, Slot(auto_prefix=False))
            cell = cell.name_cells()[holder]
        tensor = ms.Tensor(value, self.slot_dtype)
        setattr(cell, leaf, ms.Parameter(tensor, name=f"{self.path}.{name}", requires_grad=trainable))

    def slot(self, name: str) -> ms.Parameter:
        """The slot's parameter of that name."""
        cell: Any = self
        for part in name.split("."):
            cell = getattr(cell, part)
        return cell

    def fill(self, tensors: Mapping[str, np.ndarray], trainable: bool) -> None:
        """Put an adapter's tensors into the slot, padded with zeros; tensors not given become zero."""
        for name, shape in self.slot_shapes.items():
            value = tensors.get(name)
            parameter = self.slot(name)
            assign(parameter, padded(value, shape))
            parameter.requires_grad = trainable and value is not None

    def read(self, shapes: Shapes) -> Tensors:
        """Copy the slot's values to the host, cut to an adapter's true shapes."""
        cut = {name: tuple(map(slice, shape)) for name, shape in shapes.items()}
        return {name: self.slot(name).asnumpy()[part].copy() for name, part in cut.items()}

    def set_scaling(self, value: float) -> None:
        """Set the factor of the slot's contribution; 0 switches the layer off."""
        assign(self.scaling, np.array(value, np.float32))


def padded(value: np.ndarray | None, shape: tuple[int, ...]) -> np.ndarray:
    """`value` in the leading corner of zeros of `shape`; zeros alone for `None`."""
    if value is not None and value.shape == shape:
        return value
    result = np.zeros(shape, np.float32 if value is None else value.dtype)
    if value is not None:
        result[tuple(map(slice, value.shape))] = value
    return result


def slot_dtype(cell: nn.Cell, autocast: bool) -> ms.dtype:
    """An adapter's dtype: the base weight's, but float32 over half precision unless `autocast` is off."""
    dtype = getattr(cell, weight_attribute(cell)).dtype
    return ms.float32 if autocast and dtype in _LOW_PRECISION else dtype


def refuse_cell(cell: nn.Cell, path: str, method: str, supported: str) -> InputError:
    """The error for a target of a kind that a method can't wrap."""
    return InputError(
        f"{method} can't wrap the cell {path!r} of class {type(cell).__name__}; supported: {supported}"
    )
