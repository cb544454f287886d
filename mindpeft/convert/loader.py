"""Putting a checkpoint's tensors into a Cell, one at a time, and telling what happened."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import mindspore as ms
from mindspore import nn

from mindpeft.convert.checkpoint import Checkpoint
from mindpeft.convert.tensors import FLOATS, RawTensor, dtype_name
from mindpeft.errors import InputError
from mindpeft.ops.device import on_cpu, synchronize

if TYPE_CHECKING:
    from mindpeft.nn.int8 import Int8Linear

Renamer = Callable[[str], "str | None"]

_SHOWN = 8  # names per group in a report
_SHOWN_MISFITS = 5  # misshapen tensors in an error
_OLD_NORM_NAMES = {"gamma": "weight", "beta": "bias"}  # TensorFlow's, in checkpoints of 2018-2019


@dataclass
class LoadReport:
    """What a load did.

    Attributes:
        loaded: parameters of the model that took a value from the checkpoint.
        newly_initialised: parameters that kept the value they were created with (a fresh head).
        unused: tensors of the checkpoint that the model has no place for.
        misshapen: parameters whose shape differs in the checkpoint; they kept their value.
        files: the files read.
        seconds: the time it took.
    """

    loaded: list[str] = field(default_factory=list)
    newly_initialised: list[str] = field(default_factory=list)
    unused: list[str] = field(default_factory=list)
    misshapen: list[str] = field(default_factory=list)
    files: list[Path] = field(default_factory=list)
    seconds: float = 0.0

    def __str__(self) -> str:
        lines = [f"loaded {len(self.loaded)} tensors from {_joined(self.files)} in {self.seconds:.1f} s"]
        groups = {
            "newly initialised (not in the checkpoint)": self.newly_initialised,
            "newly initialised (another shape in the checkpoint)": self.misshapen,
            "unused (not in the model)": self.unused,
        }
        lines += [f"{len(names)} {title}: {_joined(names)}" for title, names in groups.items() if names]
        return "\n".join(lines)


def _joined(names: list[Any]) -> str:
    shown = ", ".join(name.name if isinstance(name, Path) else name for name in names[:_SHOWN])
    return shown + (f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else "")


def load_weights(
    cell: nn.Cell,
    checkpoint: Checkpoint,
    *,
    rename: Renamer | None = None,
    ignore_unexpected: Iterable[str] = (),
    ignore_mismatched_sizes: bool = False,
    dtype: Any = None,
    int8: Mapping[str, Int8Linear] = MappingProxyType({}),
    by_rows: Collection[str] = (),
) -> LoadReport:
    """Copy a checkpoint's tensors into a Cell's parameters.

    Everything is checked before the first parameter changes. Tensors are then read one at a time and copied
    into the parameters' own memory: the peak is the model plus the largest tensor.

    Args:
        cell: the model; its parameters are known by their place in it (``cell.parameters_and_names()``). A
            parameter that stands in several places (tied weights) may be given under any of its names.
        rename: from a tensor's name to a parameter's, or to ``None`` to leave the tensor out.
        ignore_unexpected: regular expressions; tensors whose name matches are left out in silence.
        ignore_mismatched_sizes: keep the model's value where shapes differ, instead of refusing.
        dtype: give every floating-point parameter of the cell this dtype, or that of its name in a mapping;
            ``None`` leaves each its own.
        int8: layers that round their weights themselves, by the names of those.
        by_rows: parameters of which few rows are ever needed, in a model that no graph has been compiled of.
            On the CPU they are mapped from their file instead of copied, if they can be and keep its dtype.

    Raises:
        InputError: shapes differ, two tensors claim one parameter, a floating-point tensor is meant for an
            integer parameter, or a file is damaged.
    """
    began = time.perf_counter()
    places = parameter_places(cell)
    chosen, unused = _assign(checkpoint, places, rename, [re.compile(text) for text in ignore_unexpected])
    misfits = {
        name: source
        for name, source in chosen.items()
        if _shape(places[name]) != checkpoint.info(source).shape
    }
    if misfits and not ignore_mismatched_sizes:
        raise InputError(_describe_misfits(checkpoint, misfits, places))
    chosen = {name: source for name, source in chosen.items() if name not in misfits}
    _check_dtypes(checkpoint, {name: source for name, source in chosen.items() if name not in int8}, places)

    dtypes = dtype if isinstance(dtype, Mapping) else dict.fromkeys(places, dtype)
    done: set[int] = set()
    # The largest first: while a tensor is copied it is there twice.
    for name in sorted(chosen, key=lambda name: -places[name].size):
        if name in int8:
            int8[name].take(checkpoint.read(chosen[name], ms.float32).numpy())
            done |= {id(places[name]), id(int8[name].scale)}
        elif id(places[name]) not in done:
            _set_float_dtype(places[name], dtypes[name])
            _fill(places[name], checkpoint, chosen[name], name in by_rows)
            done.add(id(places[name]))
    untouched = {name: parameter for name, parameter in places.items() if id(parameter) not in done}
    for name, parameter in untouched.items():
        _set_float_dtype(parameter, dtypes[name])
    return LoadReport(
        loaded=list(chosen),
        newly_initialised=[name for name in _first_names(untouched) if name not in misfits],
        unused=unused,
        misshapen=[name for name in misfits if name in untouched],
        files=list(checkpoint.files),
        seconds=time.perf_counter() - began,
    )


def parameter_places(cell: nn.Cell) -> dict[str, ms.Parameter]:
    """Every name under which a parameter can be reached in the cell; a tied parameter has several."""
    return {
        name: parameter
        for prefix, part in cell.cells_and_names()
        for name, parameter in part.parameters_and_names(name_prefix=prefix, expand=False)
    }


def hf_renamer(parameter_names: Iterable[str], base_model_prefix: str = "") -> Renamer:
    """Return a map from Hugging Face checkpoint names to a model's names that bridges the usual differences.

    A checkpoint of a bare backbone fits a model with a head and the reverse (``encoder.x`` and
    ``bert.encoder.x``), and the old names ``gamma`` and ``beta`` stand for ``weight`` and ``bias``.

    Args:
        parameter_names: the model's names.
        base_model_prefix: the attribute under which a model with a head holds its backbone: ``"bert"``.
    """
    known = frozenset(parameter_names)
    prefix = f"{base_model_prefix}."

    def rename(name: str) -> str:
        stem, _, last = name.rpartition(".")
        spellings = [name]
        if stem and last in _OLD_NORM_NAMES:
            spellings.append(f"{stem}.{_OLD_NORM_NAMES[last]}")
        if base_model_prefix:
            spellings += [
                spelling.removeprefix(prefix) for spelling in spellings if spelling.startswith(prefix)
            ]
            spellings += [prefix + spelling for spelling in spellings]
        return next((spelling for spelling in spellings if spelling in known), name)

    return rename


def _assign(
    checkpoint: Checkpoint,
    places: dict[str, ms.Parameter],
    rename: Renamer | None,
    ignored: list[re.Pattern[str]],
) -> tuple[dict[str, str], list[str]]:
    """Return which tensor each parameter name takes, and the tensors without a place."""
    chosen: dict[str, str] = {}
    unused: list[str] = []
    for source in checkpoint.names():
        target = source if rename is None else rename(source)
        if target in chosen:
            raise InputError(
                f"{checkpoint.path}: tensors {chosen[target]!r} and {source!r} "
                f"both stand for the parameter {target!r}"
            )
        if target in places:
            chosen[target] = source
        elif target is not None and not any(pattern.search(source) for pattern in ignored):
            unused.append(source)
    return chosen, unused


def _describe_misfits(
    checkpoint: Checkpoint, misfits: dict[str, str], places: dict[str, ms.Parameter]
) -> str:
    shown = [
        f"{source} is {checkpoint.info(source).shape} in the file and {_shape(places[name])} in the model"
        for name, source in list(misfits.items())[:_SHOWN_MISFITS]
    ]
    more = f" and {len(misfits) - len(shown)} more" if len(misfits) > len(shown) else ""
    return f"{checkpoint.path} doesn't fit the model: {'; '.join(shown)}{more}"


def _check_dtypes(checkpoint: Checkpoint, chosen: dict[str, str], places: dict[str, ms.Parameter]) -> None:
    for name, source in chosen.items():
        held, wanted = checkpoint.info(source).dtype, dtype_name(places[name].dtype)
        if held in FLOATS and wanted not in FLOATS:
            raise InputError(
                f"{checkpoint.path}: tensor {source!r} is {held}, but the model's parameter is {wanted}"
            )


def _set_float_dtype(parameter: ms.Parameter, dtype: Any) -> None:
    own = dtype_name(parameter.dtype)
    if dtype is not None and own in FLOATS and own != dtype_name(dtype):
        parameter.set_dtype(_MINDSPORE_FLOATS[dtype_name(dtype)])


_MINDSPORE_FLOATS = {"F64": ms.float64, "F32": ms.float32, "F16": ms.float16, "BF16": ms.bfloat16}


def _fill(parameter: ms.Parameter, checkpoint: Checkpoint, source: str, by_rows: bool) -> None:
    """Copy a tensor into the parameter's own memory, or map it if the parameter is read by rows.

    ``set_data`` would hand the parameter other memory, of which a function compiled by ``ms.jit`` before the
    load doesn't learn: it goes on reading the old one, freed or not.
    """
    mapped = _mapped(parameter, checkpoint, source) if by_rows else None
    value = (mapped or checkpoint.read(source, parameter.dtype)).to_mindspore()
    if mapped or parameter.has_init:  # has_init: created without memory, under no_init_parameters
        parameter.set_data(value)
    else:
        parameter.copy_(value)
        synchronize()  # or tensors wait in line for their copy, each in memory


def _mapped(parameter: ms.Parameter, checkpoint: Checkpoint, source: str) -> RawTensor | None:
    fits = on_cpu() and checkpoint.info(source).dtype == dtype_name(parameter.dtype)
    return checkpoint.mapped(source) if fits else None


def _shape(parameter: ms.Parameter) -> tuple[int, ...]:
    return tuple(parameter.shape)


def _first_names(places: dict[str, ms.Parameter]) -> list[str]:
    """One name for each parameter."""
    return list({id(parameter): name for name, parameter in reversed(places.items())}.values())[::-1]
