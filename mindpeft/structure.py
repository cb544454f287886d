"""What a compiled graph depends on besides parameters' values: all that a Cell and its children hold."""

from __future__ import annotations

import dataclasses
import enum
import functools
import hashlib
import sys
import types
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import mindspore as ms
import numpy as np
from mindspore import JitConfig, Parameter, Tensor, nn, ops

_MOST_NUMBERS = 1 << 20  # of a constant that is compared by value, not by who it is
# What operators hold besides their attributes that says no more than those.
_REPEATED = {"instance_name", "init_attrs", "log_prefix", "supported_targets", "supported_func_type"}
_OTHER = object()
_UNSET = vars(nn.Cell())  # what a Cell holds that nobody has changed anything of
_PLAIN = frozenset({type(None), type(...), bool, int, float, str, bytes})
_CONTAINERS = frozenset({dict, list, tuple})
_SIMPLE = (bool, int, float, str, bytes, ms.Type, np.dtype)
# What MindSpore notes in Cells and operators about their place and their compilations.
_BOOKKEEPING = frozenset(
    {
        *("_create_time", "_id", "_param_prefix", "_scope", "_phase", "_compile_phase", "_phase_cache"),
        *("arguments_key", "_compile_cache", "_compiled", "_exist_objs", "_exist_names", "_params_list"),
        *("_init_flag", "_is_check_and_refresh", "_lazy_construct_sig", "_lazy_user_parameters"),
        *("is_top_cell", "requires_grad", "_auto_prefix", "_jit_graph_name", "instance_name"),
        "current_phase",
        *("_cells", "_params"),  # told apart from the rest
        "_compilation",  # of `mindpeft.compiling.CompiledCell`
    }
)


def structure(cell: nn.Cell) -> str:
    """A text that two Cells have in common, in this process, if they compute the same.

    The values of parameters apart.
    """
    return _digest(_Structure().of_cell(cell))


def lasting_structure(cell: nn.Cell) -> str | None:
    """The same for other processes, with the parameters' names; None if the Cell holds what it can't tell."""
    try:
        return _digest(_LastingStructure().of_cell(cell))
    except _CannotTell:
        return None


def _digest(description: Any) -> str:
    return hashlib.sha256(repr(description).encode()).hexdigest()


class _Structure:
    """Describes values by nested tuples; of what it does not know it tells who it is."""

    def __init__(self) -> None:
        # Id of a Cell, parameter or function -> its number, for those that are met in several places.
        self.seen: dict[int, int] = {}

    def of_cell(self, cell: nn.Cell | None) -> tuple:
        """All about a Cell."""
        if cell is None:
            return ()
        if id(cell) in self.seen:
            return "again", self.seen[id(cell)]
        self.seen[id(cell)] = len(self.seen)
        parameters = [(name, self.of_parameter(value)) for name, value in cell._params.items()]
        children = [(name, self.of_cell(child)) for name, child in cell._cells.items()]
        unread = {*_BOOKKEEPING, *getattr(cell, "NOT_IN_GRAPH", ()), *getattr(cell, "HIDDEN", ())}
        unread.update(name for name, value in vars(cell).items() if _UNSET.get(name, _OTHER) is value)
        return self.of_class(type(cell)), parameters, children, self.of_attributes(cell, unread)

    def of_parameter(self, parameter: Parameter | None) -> tuple:
        if parameter is None:
            return ()
        if id(parameter) in self.seen:
            return "again", self.seen[id(parameter)]
        self.seen[id(parameter)] = len(self.seen)
        return tuple(parameter.shape), str(parameter.dtype), parameter.requires_grad

    def of_attributes(self, value: Any, unread: Iterable[str]) -> tuple:
        return tuple((name, self.of(item)) for name, item in vars(value).items() if name not in unread)

    def of(self, value: Any) -> tuple:
        """All about a value that is no child of a Cell."""
        kind = type(value)
        if kind in _PLAIN:  # most are
            return kind.__name__, value
        if kind in _CONTAINERS and not value:
            return kind.__name__, ()
        if isinstance(value, _SIMPLE):
            return kind.__name__, repr(value)
        if isinstance(value, Tensor | np.ndarray) and not isinstance(value, Parameter):
            return self.of_numbers(value)
        if isinstance(value, ops.Primitive):
            return self.of_class(type(value)), self.of_attributes(value, _REPEATED | value.attrs.keys())
        if isinstance(value, dict):
            return "dict", [(self.of(key), self.of(item)) for key, item in value.items()]
        if isinstance(value, list | tuple):
            return kind.__name__, [self.of(item) for item in value]
        if isinstance(value, types.FunctionType):
            return self.of_function(value)
        return self.of_other(value)

    def of_function(self, function: types.FunctionType) -> tuple:
        if id(function) in self.seen:
            return "again", self.seen[id(function)]
        self.seen[id(function)] = len(self.seen)
        holds = [place.cell_contents for place in function.__closure__ or ()]
        return "function", self.of_code(function.__code__), self.of([function.__defaults__, holds])

    def of_numbers(self, value: Tensor | np.ndarray) -> tuple:
        if value.size > _MOST_NUMBERS:
            return "numbers", id(value)
        return _numbers(value)

    def of_class(self, kind: type) -> Any:
        return id(kind)

    def of_code(self, code: types.CodeType) -> Any:
        return id(code)

    def of_other(self, value: Any) -> tuple:
        """Among them Cells and parameters that stand elsewhere, of which a shared graph reads one for all."""
        if isinstance(value, nn.Cell) and id(value) in self.seen:  # stands in here, too
            return self.of_cell(value)
        return "object", id(value)


# Kinds that are no more than their attributes.
_ATTRIBUTES_ALONE = (ops.GradOperation, JitConfig)


class _CannotTell(Exception):
    """A value of a kind whose meaning for a graph is unknown."""


class _LastingStructure(_Structure):
    """The same in words that mean the same in another process."""

    def of_parameter(self, parameter: Parameter | None) -> tuple:
        return getattr(parameter, "name", None), *super().of_parameter(parameter)

    def of_numbers(self, value: Tensor | np.ndarray) -> tuple:
        return _numbers(value)

    def of_class(self, kind: type) -> Any:
        name = kind.__module__, kind.__qualname__, _foreign_source(kind.__module__)
        is_found = functools.reduce(
            lambda place, part: getattr(place, part, None), name[1].split("."), sys.modules.get(name[0])
        )
        return name if is_found is kind else (name, *(self.of_made(base) for base in (kind, *kind.__bases__)))

    def of_made(self, kind: type) -> tuple:
        """A class that was made at run time: its attributes too."""
        plain = {key: value for key, value in vars(kind).items() if not key.startswith("__")}
        return kind.__qualname__, self.of(plain)

    def of_code(self, code: types.CodeType) -> Any:
        consts = [
            self.of_code(item) if isinstance(item, types.CodeType) else repr(item) for item in code.co_consts
        ]
        return code.co_code, consts, code.co_names, code.co_varnames

    def of_other(self, value: Any) -> tuple:
        if isinstance(value, Parameter):
            return self.of_parameter(value)
        if isinstance(value, nn.Cell):
            return self.of_cell(value)
        if isinstance(value, types.CodeType):
            return self.of_code(value)
        if isinstance(value, types.MethodType):
            return "method", self.of_function(value.__func__), self.of(value.__self__)
        if isinstance(value, set | frozenset):
            return "set", sorted(repr(self.of(item)) for item in value)
        if isinstance(value, enum.Enum):
            return self.of_class(type(value)), value.name
        if isinstance(value, type):
            return "class", self.of_class(value)
        if dataclasses.is_dataclass(value) or isinstance(value, _ATTRIBUTES_ALONE):
            return self.of_class(type(value)), self.of_attributes(value, ())
        raise _CannotTell(type(value))


@functools.cache
def _foreign_source(module: str) -> str:
    """A digest of a module's file; those of mindpeft and MindSpore are known by their versions."""
    path = getattr(sys.modules.get(module), "__file__", None)
    if path is None or module.split(".")[0] in ("mindpeft", "mindspore"):
        return ""
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


def _numbers(value: Tensor | np.ndarray) -> tuple:
    array = np.ascontiguousarray(value if isinstance(value, np.ndarray) else value.asnumpy())
    return "numbers", array.shape, str(value.dtype), hashlib.sha256(array.tobytes()).hexdigest()
