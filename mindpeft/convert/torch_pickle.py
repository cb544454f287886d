"""Unpickling torch's state dicts without running anything that the file asks for.

A pickle is a program. Here its calls reach only the stand-ins below, which describe tensors; every other name
is refused, and what comes out is checked before use.
"""

from __future__ import annotations

import pickle
import pickletools
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any, NamedTuple

from mindpeft.convert.tensors import STORAGE, is_count, is_shape
from mindpeft.errors import InputError

_STORAGES = {
    "DoubleStorage": "F64",
    "FloatStorage": "F32",
    "HalfStorage": "F16",
    "BFloat16Storage": "BF16",
    "LongStorage": "I64",
    "IntStorage": "I32",
    "ShortStorage": "I16",
    "CharStorage": "I8",
    "ByteStorage": "U8",
    "BoolStorage": "BOOL",
    "UntypedStorage": "U8",
}
_STORAGE_MODULES = ("torch", "torch.cuda", "torch.storage")
_DTYPES = {
    "float64": "F64",
    "float32": "F32",
    "float16": "F16",
    "bfloat16": "BF16",
    "int64": "I64",
    "int32": "I32",
    "int16": "I16",
    "int8": "I8",
    "uint64": "U64",
    "uint32": "U32",
    "uint16": "U16",
    "uint8": "U8",
    "bool": "BOOL",
}
_WRAPPERS = ("state_dict", "model")  # where training scripts put the weights beside their own state
_MEMO_WRITES = ("PUT", "BINPUT", "LONG_BINPUT")


class StorageRef(NamedTuple):
    """A storage that the pickle mentions: elements ``first`` to ``first + size`` of the block ``key``."""

    key: str
    dtype: str
    first: int
    size: int


class TensorRef(NamedTuple):
    """A tensor that the pickle describes: a strided view of a storage. Offsets and strides count elements."""

    storage: StorageRef
    dtype: str
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]

    @property
    def extent(self) -> int:
        """The number of elements from the view's first to its last."""
        if 0 in self.shape:
            return 0
        return 1 + sum((size - 1) * step for size, step in zip(self.shape, self.stride, strict=True))

    @property
    def is_contiguous(self) -> bool:
        """Whether the elements lie in C order without gaps."""
        expected = 1
        for size, step in zip(reversed(self.shape), reversed(self.stride), strict=True):
            if size != 1 and step != expected:
                return 0 in self.shape
            expected *= size
        return True


class _StorageType(NamedTuple):
    """Stands for torch's storage classes."""

    dtype: str


class _DType(NamedTuple):
    """Stands for torch's dtype objects."""

    dtype: str


class Unpickler(pickle.Unpickler):
    """Reads one pickle of an open file; ``storages`` holds the storages it mentioned, by key."""

    def __init__(self, file: IO[bytes], path: Path) -> None:
        super().__init__(file, encoding="utf-8")
        self._path = path
        self._allowed = _allowed_names()
        self.storages: dict[str, StorageRef] = {}

    def find_class(self, module: str, name: str) -> Any:
        """Return the stand-in for a name, or refuse the file."""
        if (module, name) not in self._allowed:
            raise InputError(
                f"{self._path} asks for {module}.{name}, which is not a tensor or a plain container: "
                "refused, and nothing of it was run"
            )
        return self._allowed[module, name]

    def persistent_load(self, pid: Any) -> StorageRef:
        """Return the description of a storage that lies outside the pickle."""
        kind, storage_type, key, _location, size, *view = pid
        if kind != "storage" or not isinstance(storage_type, _StorageType) or not is_count(size):
            raise ValueError("a malformed storage")
        whole = self.storages.setdefault(str(key), StorageRef(str(key), storage_type.dtype, 0, size))
        if whole.dtype != storage_type.dtype:
            raise ValueError(f"storage {key} has two dtypes")
        if not view or view[0] is None:
            return whole
        _view_key, first, view_size = view[0]
        if not (is_count(first) and is_count(view_size) and first + view_size <= whole.size):
            raise ValueError(f"a view outside of storage {key}")
        return StorageRef(whole.key, whole.dtype, first, view_size)


def unpickle(file: IO[bytes], path: Path) -> tuple[Any, dict[str, StorageRef]]:
    """Read the pickle at the file's position, and leave the position after it.

    Returns:
        the object, with ``TensorRef`` in place of tensors, and the storages by key.

    Raises:
        InputError: the pickle is damaged, or asks for anything but tensors and plain containers.
    """
    try:
        start = file.tell()
        _check_opcodes(file)
        file.seek(start)
        unpickler = Unpickler(file, path)
        return unpickler.load(), unpickler.storages
    except InputError:
        raise
    except Exception as error:  # a damaged pickle can fail in any way
        reason = f"{type(error).__name__}: {error}"
        raise InputError(f"{path} is truncated, damaged or no torch file: {reason}") from error


def _check_opcodes(file: IO[bytes]) -> None:
    """Walk through the pickle without running it: its text is complete, and it asks for no giant memo table.

    CPython's unpickler allocates its memo up to the largest index written: one opcode could ask for 64 GB.
    """
    for count, (opcode, argument, _) in enumerate(pickletools.genops(file)):
        if opcode.name in _MEMO_WRITES and argument > count:
            raise ValueError(f"memo index {argument} after {count} instructions")


def _allowed_names() -> dict[tuple[str, str], Any]:
    """Fresh stand-ins for one file: a pickle can set attributes on what it gets, never on another's."""

    def rebuild(storage: Any, offset: Any, size: Any, stride: Any, *_: Any) -> TensorRef:
        return TensorRef(storage, storage.dtype, offset, tuple(size), tuple(stride))

    def rebuild_typed(
        storage: Any, offset: Any, size: Any, stride: Any, _grad: Any, _hooks: Any, dtype: Any, *_: Any
    ) -> TensorRef:
        return TensorRef(storage, dtype.dtype, offset, tuple(size), tuple(stride))

    def parameter(data: Any, *_: Any) -> Any:
        return data

    functions: dict[str, Callable] = {
        "_rebuild_tensor": rebuild,
        "_rebuild_tensor_v2": rebuild,
        "_rebuild_tensor_v3": rebuild_typed,
        "_rebuild_parameter": parameter,
        "_rebuild_parameter_with_state": parameter,
    }
    return {
        ("collections", "OrderedDict"): OrderedDict,
        ("torch", "Size"): tuple,
        **{("torch._utils", name): function for name, function in functions.items()},
        **{("torch", name): _DType(dtype) for name, dtype in _DTYPES.items()},
        **{(m, name): _StorageType(dtype) for m in _STORAGE_MODULES for name, dtype in _STORAGES.items()},
    }


def state_dict(content: Any, path: Path) -> tuple[dict[str, TensorRef], list[str]]:
    """Return the tensors of an unpickled checkpoint by name, and the keys of what else it holds.

    The tensors are those of the dictionary itself or, if it has none, of its ``state_dict`` or ``model``.

    Raises:
        InputError: there is no dictionary of tensors, or a tensor isn't a view of its storage.
    """
    if not isinstance(content, dict):
        raise InputError(f"{path} holds a {_kind(content)}; needed: a dictionary from names to tensors")
    top = _entries(content)
    inner = {key: _entries(top[key]) for key in _WRAPPERS if isinstance(top.get(key), dict)}
    for wrapper, entries in {None: top, **inner}.items():
        tensors = {name: value for name, value in entries.items() if isinstance(value, TensorRef)}
        if tensors:
            for name, tensor in tensors.items():
                _check_tensor(name, tensor, path)
            return tensors, [key for key in {**top, **entries} if key != wrapper and key not in tensors]
    raise InputError(f"{path} holds no dictionary of tensors; its keys: {', '.join(top) or 'none'}")


def _entries(mapping: dict) -> dict[str, Any]:
    """A plain dictionary's worth of an unpickled one: a hostile pickle can give that its own ``items``."""
    return {key: value for key, value in dict.items(mapping) if isinstance(key, str)}


def _check_tensor(name: str, tensor: TensorRef, path: Path) -> None:
    """Refuse a tensor that isn't a view of its storage."""
    well_formed = (
        isinstance(tensor.storage, StorageRef)
        and isinstance(tensor.dtype, str)
        and tensor.dtype in STORAGE
        and is_count(tensor.offset)
        and is_shape(tensor.shape)
        and isinstance(tensor.stride, list | tuple)
        and all(map(is_count, tensor.stride))
        and len(tensor.stride) == len(tensor.shape)
    )
    if not well_formed:
        raise InputError(f"{path} is damaged: tensor {name!r} has a malformed description")


def _kind(value: Any) -> str:
    return "tensor" if isinstance(value, TensorRef) else type(value).__name__
