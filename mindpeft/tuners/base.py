"""What every injected layer shares: the wrapped cell, its active slot, and the arithmetic helpers.

A `Slot` owns ONE set of adapter tensors, whose names are the adapter file's names. Which adapter sits in it
is a matter of parameter values alone, so a compiled graph never depends on an adapter's name, rank (up to the
slot's) or alpha. A `TunerLayer` is a slot around an original cell (`base_layer`); a `SharedSlot` holds what
all layers of an adapter share. Adapters that are active together, or parts of a hybrid, sit in layers nested
around one another.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import mindspore as ms
import numpy as np
from mindspore import nn, ops

from mindpeft.errors import InputError
from mindpeft.nn.int8 import Int8Linear
from mindpeft.ops.columns import ScaleColumns
from mindpeft.ops.linear import Product
from mindpeft.parameters import assign

Tensors = dict[str, np.ndarray]  # tensor name -> value on the host, in the adapter's true shape
Shapes = dict[str, tuple[int, ...]]

_LINEAR_CLASSES = frozenset({"Dense", "Linear", "Int8Linear", "Conv1D"})
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


@dataclass(frozen=True)
class Site:
    """Where a config meets a cell: all that a method may look at to say what an adapter has there.

    Attributes:
        cell: the original cell; the whole model at the path "".
        path: its dotted name in the base model.
        config: the method's config, targets resolved.
        targets: all cells that the config targets, by path.
    """

    cell: nn.Cell
    path: str
    config: Any
    targets: Mapping[str, nn.Cell]


class _Choose(nn.Cell):
    """One of two tensors of the same shape; Select's own gradient has zeros of that shape in the graph."""

    def construct(self, first_is_it: ms.Tensor, first: ms.Tensor, second: ms.Tensor) -> ms.Tensor:
        return ops.select(first_is_it, first, second)

    def bprop(self, first_is_it, first, second, out, dout):
        share = ops.cast(first_is_it, dout.dtype)
        return ops.zeros_like(first_is_it), dout * share, dout * (1.0 - share)


class Holder(nn.Cell):
    """A holder that gives the parameters of a slot dotted names (`lora_A.weight`)."""


class Slot(nn.Cell):
    """One adapter's tensors at one place. A method derives one subclass per kind of place.

    Args:
        path: the place; "" for the whole model.
        shapes: the slot's tensors and their shapes.
        dtype: the slot's dtype.
        number: 0 for the first slot of a place; further ones need parameter names of their own.
    """

    # Names for people and files, which differ between slots whose graphs do not (`mindpeft.structure`).
    NOT_IN_GRAPH: ClassVar[tuple[str, ...]] = ("path", "label")
    # Tensors that no gradient reaches and that don't count as parameters (a fixed random projection).
    BUFFERS: ClassVar[frozenset[str]] = frozenset()
    # Cells that share their parameter with this one are changed in the same way.
    FOLLOWS_TIES: ClassVar[bool] = False
    # What it does with other slots, or they with it; fixed in the graph.
    role: Any = None

    def __init__(self, path: str, shapes: Shapes, dtype: ms.dtype, number: int = 0) -> None:
        super().__init__(auto_prefix=False)
        self.path = path
        # One for each slot: MindSpore gives one Cell's gradient for a first shape to others too.
        self.choose = _Choose()
        self.slot_dtype = dtype
        self.slot_shapes: Shapes = {}
        self.label = ".".join(part for part in (path, f"slot{number}" if number else "") if part)
        self.scaling = ms.Parameter(ms.Tensor(0.0, dtype), name=self._name("scaling"), requires_grad=False)
        self.reserve(shapes)

    def _name(self, tensor: str) -> str:
        return f"{self.label}.{tensor}" if self.label else tensor

    # What a method says about an adapter, from the original cell and the config alone ----------------------

    @classmethod
    def tensor_shapes(cls, site: Site) -> Shapes:
        """The tensors that an adapter has at a site, by their names in the file."""
        raise NotImplementedError

    @classmethod
    def file_shapes(cls, site: Site) -> Shapes:
        """The tensors that a file has at a site, where they are others than those of a fresh adapter."""
        return cls.tensor_shapes(site)

    @classmethod
    def to_file(cls, site: Site, tensors: Tensors) -> Tensors:
        """What is written of an adapter's tensors."""
        return tensors

    @classmethod
    def check_values(cls, site: Site, tensors: Tensors) -> None:
        """Refuse a file's tensors of the right names and shapes whose values can't be an adapter's.

        Raises:
            InputError: a value is not allowed where it is.
        """

    @classmethod
    def initial_tensors(cls, site: Site) -> Tensors:
        """Fresh values of those tensors, from NumPy's global generator (which `mindspore.set_seed` seeds)."""
        raise NotImplementedError

    @classmethod
    def scaling_of(cls, site: Site) -> float:
        """The factor of the adapter's contribution; 1 for a method without one. 0 switches it off."""
        return 1.0

    @classmethod
    def takes_out(cls, site: Site) -> bool:
        """Whether a fresh adapter is a part of the cell's weights, which is taken out of them (PiSSA)."""
        return False

    @classmethod
    def beginning(cls, site: Site, fresh: Tensors | None) -> Tensors:
        """What tells ``taken_out`` how the adapter began; made from the cell's whole weights.

        Args:
            fresh: what ``initial_tensors`` gave a fresh adapter; ``None`` for one of a file.
        """
        return cls.initial_tensors(site) if fresh is None else fresh

    @classmethod
    def taken_out(cls, site: Site, initial: Tensors) -> Tensors:
        """What a fresh adapter takes out of the cell's parameters, by attribute, in float32.

        Args:
            initial: what ``beginning`` gave.
        """
        return {}

    @classmethod
    def trained(cls, site: Site, names: Collection[str]) -> frozenset[str]:
        """Which of an adapter's tensors are trained."""
        return frozenset(names) - cls.BUFFERS

    @classmethod
    def holds(cls, room: Shapes, shapes: Shapes) -> bool:
        """Whether an adapter of these shapes can sit in a slot of those, which may grow.

        True as it stands for methods where rows and columns of zeros change nothing (a higher rank). A
        method where they do compares for equality: an adapter of another shape then gets a slot of its own.
        """
        return True

    def configure(self, config: Any, trainable: bool) -> bool:
        """Take over what a config fixes in the graph; return whether that changed the graph."""
        return False

    def take_in(self, slots: Sequence[Slot]) -> None:
        """Decide on the slot's ``role``, given the slots of its adapter's earlier parts at its place.

        Called for all slots, the innermost first; those that stand by get none.
        """

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

    def attribute_of(self, tensor: str) -> str:
        """Where in the slot a tensor sits, dotted."""
        return tensor

    def _create(self, name: str, value: np.ndarray, trainable: bool) -> None:
        *holders, leaf = self.attribute_of(name).split(".")
        cell: nn.Cell = self
        for holder in holders:
            if holder not in cell.name_cells():
                setattr(cell, holder, Holder(auto_prefix=False))
            cell = cell.name_cells()[holder]
        tensor = ms.Tensor(value, self.slot_dtype)
        setattr(cell, leaf, ms.Parameter(tensor, name=self._name(name), requires_grad=trainable))

    def slot(self, name: str) -> ms.Parameter:
        """The slot's parameter of that name."""
        cell: Any = self
        for part in self.attribute_of(name).split("."):
            cell = getattr(cell, part)
        return cell

    def fill(self, tensors: Mapping[str, np.ndarray], trained: frozenset[str]) -> None:
        """Put an adapter's tensors into the slot, padded with zeros; tensors not given become zero.

        Args:
            tensors: by name, in the adapter's true shapes.
            trained: the names of those that get gradients.
        """
        for name, shape in self.slot_shapes.items():
            parameter = self.slot(name)
            assign(parameter, padded(tensors.get(name), shape))
            parameter.requires_grad = name in trained and name in tensors

    def read(self, shapes: Shapes) -> Tensors:
        """Copy the slot's values to the host, cut to an adapter's true shapes."""
        cut = {name: tuple(map(slice, shape)) for name, shape in shapes.items()}
        return {name: self.slot(name).asnumpy()[part].copy() for name, part in cut.items()}

    def set_scaling(self, value: float) -> bool:
        """Set the factor of the slot's contribution, 0 for off; return whether that made graphs stale."""
        assign(self.scaling, np.array(value, np.float32))
        return False

    def unless_off(self, adapted: ms.Tensor, plain: ms.Tensor) -> ms.Tensor:
        """`adapted`, or `plain` while the slot is switched off; runs inside a graph."""
        return self.choose(ops.not_equal(self.scaling, 0.0), adapted, plain)


class SharedSlot(Slot):
    """Tensors that all layers of one adapter share; its place is the model itself."""


class TunerLayer(Slot):
    """A slot around a cell.

    Args:
        base_layer: the original cell, or another layer around it.
        shared: the adapter's `SharedSlot`, if the method has one.

    Attributes:
        linear, scale_columns: the device's own product with a matrix, and with a factor for each column.
    """

    def __init__(
        self,
        base_layer: nn.Cell,
        path: str,
        shapes: Shapes,
        dtype: ms.dtype,
        number: int = 0,
        shared: SharedSlot | None = None,
    ) -> None:
        super().__init__(path, shapes, dtype, number)
        self.base_layer = base_layer
        self.shared = shared
        self.linear, self.scale_columns = Product(), ScaleColumns()
        self.is_product = False  # more than the product that `mindpeft.nn.Linear` without a bias is

    @classmethod
    def merged(cls, site: Site, weights: Tensors, tensors: Tensors, shared: Tensors | None = None) -> Tensors:
        """What merging makes of the cell's own parameters.

        Args:
            weights: the cell's parameters by attribute, float32.
            tensors: the adapter's, in their true shapes.
            shared: those of its `SharedSlot`.

        Returns:
            the parameters that change, by attribute, in float32.
        """
        raise NotImplementedError

    def release(self) -> None:
        """Undo what the layer did to the original cell; called when it is taken out for good."""

    @classmethod
    def check_merge(cls, site: Site) -> None:
        """Raise ``InputError`` if this method (one without `merged`), or this adapter, can't be merged."""
        if cls.merged.__func__ is TunerLayer.merged.__func__:
            raise InputError(f"{site.config.peft_type.value} can't be merged into the base model's weights")


def original(cell: nn.Cell) -> nn.Cell:
    """The original cell inside the layers around it."""
    while isinstance(cell, TunerLayer):
        cell = cell.base_layer
    return cell


def weight_matrix(cell: nn.Cell) -> np.ndarray:
    """A linear cell's weight, (out, in), in float32."""
    if isinstance(cell, Int8Linear):
        return cell.read()
    value = cell.weight.asnumpy().astype(np.float32)
    return value.T if is_transposed(cell) else value


def float_weight(cell: nn.Cell, dtype: ms.dtype) -> ms.Tensor:
    """A linear cell's weight as it lies, in a floating-point dtype; runs inside a graph."""
    return ops.cast(cell.float_weight() if isinstance(cell, Int8Linear) else cell.weight, dtype)


def padded(value: np.ndarray | None, shape: tuple[int, ...]) -> np.ndarray:
    """`value` in the leading corner of zeros of `shape`; zeros alone for `None`."""
    if value is not None and value.shape == shape:
        return value
    result = np.zeros(shape, np.float32 if value is None else value.dtype)
    if value is not None:
        result[tuple(map(slice, value.shape))] = value
    return result


def kaiming_uniform(shape: tuple[int, ...], random: Any = np.random) -> np.ndarray:
    """Kaiming's uniform with a = sqrt(5), torch's choice for a weight: U(-b, b) with b = 1 / sqrt(fan in).

    ``random`` has the functions of ``numpy.random``.
    """
    bound = 1 / math.sqrt(math.prod(shape[1:]))
    return random.uniform(-bound, bound, shape).astype(np.float32)


def slot_dtype(cell: nn.Cell, autocast: bool) -> ms.dtype:
    """An adapter's dtype: the cell's weights', but float32 over half precision unless `autocast` is off."""
    floats = [p.dtype for p in cell.get_parameters() if p.dtype in (ms.float32, ms.float64, *_LOW_PRECISION)]
    dtype = floats[0] if floats else ms.float32
    return ms.float32 if autocast and dtype in _LOW_PRECISION else dtype


def check_linear(cell: nn.Cell, path: str, method: str, transposed: bool = True) -> None:
    """Raise ``InputError`` unless a method can wrap the cell as a linear one.

    Args:
        transposed: whether the method has (in, out) weights (Conv1D) as well.
    """
    if not is_linear(cell) or (is_transposed(cell) and not transposed):
        raise refuse_cell(
            cell, path, method, "linear cells" if transposed else "linear cells with (out, in) weights"
        )
    if getattr(cell, "activation", None) is not None:
        raise InputError(
            f"{method} can't wrap {path!r}: its activation is fused into it; make that a cell of its own"
        )


def refuse_cell(cell: nn.Cell, path: str, method: str, supported: str) -> InputError:
    """The error for a target of a kind that a method can't wrap."""
    return InputError(
        f"{method} can't wrap the cell {path!r} of class {type(cell).__name__}; supported: {supported}"
    )
