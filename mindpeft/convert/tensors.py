"""Tensors as checkpoints hold them: a dtype name, a shape and plain little-endian bytes."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mindspore as ms
import numpy as np
from mindspore.common import np_dtype

from mindpeft.errors import InputError, did_you_mean

# Safetensors' name of each dtype -> the NumPy dtype that stores its bits. NumPy has no bfloat16: its bits
# travel as uint16.
STORAGE = {
    "F64": np.dtype("<f8"),
    "F32": np.dtype("<f4"),
    "F16": np.dtype("<f2"),
    "BF16": np.dtype("<u2"),
    "I64": np.dtype("<i8"),
    "I32": np.dtype("<i4"),
    "I16": np.dtype("<i2"),
    "I8": np.dtype("i1"),
    "U64": np.dtype("<u8"),
    "U32": np.dtype("<u4"),
    "U16": np.dtype("<u2"),
    "U8": np.dtype("u1"),
    "BOOL": np.dtype("?"),
}
FLOATS = frozenset({"F64", "F32", "F16", "BF16"})

_FROM_NUMPY = {dtype: name for name, dtype in STORAGE.items() if name != "BF16"}
_SPELLINGS = {
    **{name.lower(): name for name in STORAGE},
    **{dtype.name: name for dtype, name in _FROM_NUMPY.items()},
    "bfloat16": "BF16",
    "fp32": "F32",
    "fp16": "F16",
    "float": "F32",
    "half": "F16",
    "double": "F64",
}
_ALIGNMENT = 64  # one cache line, and the width of an AVX-512 load
_MAX_DIMENSIONS = 32  # NumPy's limit
_CHUNK = 1 << 20  # elements converted at a time, so that temporaries stay small


def dtype_name(dtype: Any) -> str:
    """Return safetensors' name (``"F32"``, ``"BF16"``, ...) of a dtype.

    Args:
        dtype: that name itself, a common spelling (``"bfloat16"``, ``"fp16"``), a MindSpore or a NumPy dtype.

    Raises:
        InputError: there is no such dtype, or checkpoints don't hold it.
    """
    spelling = str(np.dtype(dtype)) if isinstance(dtype, type) else str(dtype)
    name = _SPELLINGS.get(spelling.lower())
    if name is None:
        raise InputError(
            f"unknown tensor dtype {spelling!r}{did_you_mean(spelling, _SPELLINGS)}; "
            f"allowed: {', '.join(STORAGE)}"
        )
    return name


def element_size(dtype: str) -> int:
    """Bytes of one element of the safetensors dtype ``dtype``."""
    return STORAGE[dtype].itemsize


def is_shape(value: Any) -> bool:
    """Whether ``value``, from an untrusted file, is a list or tuple of dimensions that NumPy can hold."""
    return (
        isinstance(value, list | tuple)
        and len(value) <= _MAX_DIMENSIONS
        and all(map(is_count, value))
        and math.prod(size for size in value if size) < 2**59
    )


def is_count(value: Any) -> bool:
    """Whether ``value``, from an untrusted file, is a whole number that a file's size or a step can be."""
    return type(value) is int and 0 <= value < 2**63


def empty_bytes(nbytes: int) -> np.ndarray:
    """Return ``nbytes`` uninitialised bytes whose address vector instructions like."""
    block = np.empty(nbytes + _ALIGNMENT, dtype=np.uint8)
    start = -block.ctypes.data % _ALIGNMENT
    return block[start : start + nbytes]


@dataclass(frozen=True)
class TensorInfo:
    """What a checkpoint says about one tensor without reading it."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: Path

    @property
    def size(self) -> int:
        """The number of elements."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """The number of bytes."""
        return self.size * element_size(self.dtype)


@dataclass(frozen=True, eq=False)
class RawTensor:
    """One tensor's value.

    Attributes:
        dtype: safetensors' name, a key of ``STORAGE``.
        shape: the dimensions; ``()`` for a scalar.
        data: the bytes, a flat contiguous uint8 array in C order, little-endian.
    """

    dtype: str
    shape: tuple[int, ...]
    data: np.ndarray

    def __post_init__(self) -> None:
        expected = math.prod(self.shape) * element_size(self.dtype)
        if self.data.dtype != np.uint8 or self.data.shape != (expected,):
            raise ValueError(f"a {self.dtype} tensor of shape {self.shape} needs {expected} flat bytes")

    @property
    def nbytes(self) -> int:
        """The number of bytes."""
        return self.data.nbytes

    def load(self) -> RawTensor:
        """Return itself: a value is the simplest case of a ``LazyTensor``."""
        return self

    def parts(self) -> Iterator[RawTensor]:
        """Yield itself, as the one part that it has."""
        yield self

    def stored(self) -> np.ndarray:
        """The value as an array of its storage dtype, without a copy: bfloat16 as its uint16 bits."""
        return self.data.view(STORAGE[self.dtype]).reshape(self.shape)

    def numpy(self) -> np.ndarray:
        """The value as a NumPy array: a view, but for bfloat16, which is widened (exactly) to float32."""
        return self.astype("F32").stored() if self.dtype == "BF16" else self.stored()

    def astype(self, dtype: Any) -> RawTensor:
        """Return the value in another dtype, rounded to nearest, ties to even; itself if it has it already.

        As in torch, what isn't float32 becomes bfloat16 by way of float32.
        """
        target = dtype_name(dtype)
        if target == self.dtype:
            return self
        result = RawTensor(target, self.shape, empty_bytes(math.prod(self.shape) * element_size(target)))
        convert_into(result, 0, self)
        return result

    def to_mindspore(self) -> ms.Tensor:
        """Return a MindSpore tensor with exactly these bits; on CPU it shares this tensor's memory."""
        array = self.stored()
        return ms.Tensor.from_numpy(array.view(np_dtype.bfloat16) if self.dtype == "BF16" else array)

    @classmethod
    def from_numpy(cls, array: np.ndarray) -> RawTensor:
        """Wrap an array, copying only if it isn't contiguous and little-endian.

        Raises:
            InputError: checkpoints don't hold its dtype.
        """
        shape = array.shape
        name = "BF16" if array.dtype.name == "bfloat16" else _FROM_NUMPY.get(array.dtype.newbyteorder("<"))
        if name is None:
            raise InputError(f"can't store an array of dtype {array.dtype}; allowed: {', '.join(STORAGE)}")
        stored = array.view(np.uint16) if name == "BF16" else array
        flat = np.ascontiguousarray(stored, dtype=STORAGE[name]).reshape(-1)
        return cls(name, shape, flat.view(np.uint8))

    @classmethod
    def from_parameter(cls, parameter: ms.Parameter | ms.Tensor) -> RawTensor:
        """Wrap a MindSpore tensor's value, bit by bit; on CPU it shares the tensor's memory.

        Raises:
            InputError: checkpoints don't hold its dtype.
        """
        return cls.from_numpy(parameter.asnumpy())


@dataclass(frozen=True, eq=False)
class LazyTensor:
    """A tensor whose value is fetched when a writer comes to it, so that a model is never held twice.

    Attributes:
        load: fetches it.
        pieces: fetches it some rows at a time, if it can be had so.
    """

    dtype: str
    shape: tuple[int, ...]
    load: Callable[[], RawTensor]
    pieces: Callable[[], Iterator[RawTensor]] | None = None

    def parts(self) -> Iterator[RawTensor]:
        """The value, whole or some rows at a time."""
        if self.pieces is None:
            yield self.load()
        else:
            yield from self.pieces()

    @property
    def nbytes(self) -> int:
        """The number of bytes."""
        return math.prod(self.shape) * element_size(self.dtype)

    @classmethod
    def from_parameter(cls, parameter: ms.Parameter | ms.Tensor, dtype: Any = None) -> LazyTensor:
        """A parameter as it will be when written, in ``dtype`` (``None``: its own)."""
        target = dtype_name(parameter.dtype if dtype is None else dtype)
        shape = tuple(parameter.shape)
        return cls(target, shape, lambda: RawTensor.from_parameter(parameter).astype(target))


def convert_into(target: RawTensor, start: int, source: RawTensor) -> None:
    """Write ``source``, converted to ``target``'s dtype, over ``target``'s elements from ``start`` on."""
    flat_target = target.data.view(STORAGE[target.dtype])
    flat_source = source.data.view(STORAGE[source.dtype])
    with np.errstate(over="ignore", invalid="ignore"):  # too large for float16 is inf, as in torch
        for first in range(0, flat_source.size, _CHUNK):
            chunk = flat_source[first : first + _CHUNK]
            place = flat_target[start + first : start + first + chunk.size]
            values = _widen(chunk) if source.dtype == "BF16" else chunk
            place[:] = _narrow(values.astype(np.float32)) if target.dtype == "BF16" else values


def _widen(bits: np.ndarray) -> np.ndarray:
    """bfloat16 bits -> float32: bfloat16 is the upper half of a float32."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def _narrow(values: np.ndarray) -> np.ndarray:
    """float32 -> bfloat16 bits, to nearest, ties to even; a NaN stays a NaN of the same sign."""
    bits = values.view(np.uint32)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    quiet_nan = (bits >> 16) | 0x0040
    return np.where(np.isnan(values), quiet_nan, rounded).astype(np.uint16)
