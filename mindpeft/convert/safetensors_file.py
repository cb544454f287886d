"""Safetensors files, read tensor by tensor and written as a stream.

The `safetensors` package can't give bfloat16 to NumPy and maps files into memory, where every page that is
touched counts as the process's own; the format is small enough to read and write here. So a tensor is read,
unless most of its pages are never touched: an embedding table may be mapped.
"""

from __future__ import annotations

import json
import math
import mmap
import os
import struct
import sys
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import IO, Any

import numpy as np

from mindpeft.convert.tensors import (
    STORAGE,
    LazyTensor,
    RawTensor,
    TensorInfo,
    element_size,
    empty_bytes,
    is_count,
    is_shape,
)
from mindpeft.errors import InputError
from mindpeft.files import atomic_write

_HEADER_LIMIT = 100_000_000  # bytes; the limit of the safetensors package
_LENGTH = struct.Struct("<Q")
_WRITE_CHUNK = 1 << 26  # bytes per write call
_MAPS = sys.platform in ("linux", "darwin") and sys.byteorder == "little"


class SafetensorsFile:
    """An open safetensors file whose header has been checked: every tensor lies inside, none overlap.

    Attributes:
        infos: what each tensor is, in the order of the file's bytes.
        metadata: the header's ``__metadata__``.

    Raises:
        InputError: the file can't be read, is truncated, or isn't a valid safetensors file.
    """

    def __init__(self, path: str | os.PathLike) -> None:
        self.path = Path(path)
        self.ignored: list[str] = []
        self._file = open_binary(self.path)
        try:
            header, self._data_start, data_size = _read_header(self._file, self.path)
            self.metadata = _metadata(header.pop("__metadata__", None), self.path)
            self.infos, self._offsets = _check_entries(header, data_size, self.path)
        except BaseException:
            self.close()
            raise

    def read(self, name: str, start: int = 0, stop: int | None = None) -> RawTensor:
        """Read one tensor into fresh memory, or its leading rows ``start:stop`` alone."""
        info = self.infos[name]
        shape, first_byte, nbytes = row_range(info, start, stop)
        data = read_bytes(self._file, self._data_start + self._offsets[name] + first_byte, nbytes, self.path)
        return RawTensor(info.dtype, shape, data)

    def map(self, name: str) -> RawTensor | None:
        """Map one tensor: its pages come from the file when touched, and are the process's own once written.

        The mapping lives as long as the tensor's memory is in use, whether the file is closed, deleted or
        another takes its name. What others write into the file itself may show; it is never written to here.

        Returns:
            The tensor; None where it can't be mapped: it is empty or lies askew in the file, or the system
            is none that this is written for, or refuses.

        Raises:
            InputError: the file has been cut since it was opened.
        """
        info, begin = self.infos[name], self._data_start + self._offsets[name]
        if not _MAPS or info.size == 0 or begin % element_size(info.dtype):
            return None
        if (
            os.fstat(self._file.fileno()).st_size < begin + info.nbytes
        ):  # touching what is behind the end kills
            raise InputError(f"{self.path} is truncated: it ends inside a tensor")
        before = begin % mmap.ALLOCATIONGRANULARITY
        try:
            pages = mmap.mmap(
                self._file.fileno(), before + info.nbytes, access=mmap.ACCESS_COPY, offset=begin - before
            )
        except OSError:
            return None
        return RawTensor(info.dtype, info.shape, np.frombuffer(pages, np.uint8, offset=before))

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def open_binary(path: Path) -> IO[bytes]:
    """Open a file for reading, or say in one sentence why that's impossible."""
    try:
        return open(path, "rb")
    except OSError as error:
        raise InputError(f"can't read {path}: {error.strerror or error}") from error


def row_range(info: TensorInfo, start: int, stop: int | None) -> tuple[tuple[int, ...], int, int]:
    """The shape, first byte and number of bytes of a contiguous tensor's leading rows ``start:stop``."""
    if stop is None and start == 0:
        return info.shape, 0, info.nbytes
    first, last, _ = slice(start, stop).indices(info.shape[0])
    row = math.prod(info.shape[1:]) * element_size(info.dtype)
    rows = max(last - first, 0)
    return (rows, *info.shape[1:]), first * row, rows * row


def read_bytes(file: IO[bytes], offset: int, nbytes: int, path: Path) -> Any:
    """Read exactly ``nbytes`` at ``offset`` into a fresh uint8 array."""
    data = empty_bytes(nbytes)
    view = memoryview(data)
    try:
        file.seek(offset)
        done = 0
        while done < nbytes:
            count = file.readinto(view[done:])
            if not count:
                raise InputError(f"{path} is truncated: it ends inside a tensor")
            done += count
    except OSError as error:
        raise InputError(f"can't read {path}: {error.strerror or error}") from error
    return data


def _read_header(file: IO[bytes], path: Path) -> tuple[dict[str, Any], int, int]:
    """Return the parsed header, where the data starts, and how many bytes of it there are."""
    file_size = os.fstat(file.fileno()).st_size
    if file_size < _LENGTH.size:
        raise InputError(f"{path} is not a safetensors file: it has {file_size} bytes, too few for a header")
    (length,) = _LENGTH.unpack(file.read(_LENGTH.size))
    if length > _HEADER_LIMIT:
        raise InputError(
            f"{path} is not a safetensors file: its header would have {length} bytes, "
            f"more than the {_HEADER_LIMIT} allowed"
        )
    if length > file_size - _LENGTH.size:
        raise InputError(f"{path} is truncated: {file_size} bytes can't hold its header of {length} bytes")
    try:
        header = json.loads(file.read(length).decode("utf-8"), object_pairs_hook=_unique_keys)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path} has a corrupt safetensors header: {error}") from error
    if not isinstance(header, dict):
        raise InputError(f"{path} has a corrupt safetensors header: not a JSON object")
    data_start = _LENGTH.size + length
    return header, data_start, file_size - data_start


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        raise ValueError("a key occurs twice")
    return result


def _metadata(value: Any, path: Path) -> dict[str, str]:
    if value is None:
        return {}
    if not isinstance(value, dict) or not all(isinstance(text, str) for text in value.values()):
        raise InputError(f"{path} has a corrupt safetensors header: __metadata__ must map text to text")
    return value


def _check_entries(
    header: Mapping[str, Any], data_size: int, path: Path
) -> tuple[dict[str, TensorInfo], dict[str, int]]:
    """Validate every entry; the tensors must fill the data exactly, in any order."""
    spans = sorted(((*_check_entry(name, entry, path), name) for name, entry in header.items()), key=_place)
    infos, offsets, position = {}, {}, 0
    for begin, end, info, name in spans:
        if end > data_size:
            raise InputError(
                f"{path} is truncated: tensor {name!r} ends at byte {end} of the data, which has {data_size}"
            )
        if begin != position:
            fault = "overlaps another tensor" if begin < position else "leaves a gap before it"
            raise InputError(f"{path} has a corrupt safetensors header: tensor {name!r} {fault}")
        infos[name], offsets[name], position = info, begin, end
    if position != data_size:
        raise InputError(
            f"{path} is corrupt: {data_size - position} bytes after its last tensor belong to none"
        )
    return infos, offsets


def _place(span: tuple[int, int, TensorInfo, str]) -> tuple[int, int]:
    return span[0], span[1]


def _check_entry(name: str, entry: Any, path: Path) -> tuple[int, int, TensorInfo]:
    """Return an entry's first byte, end and info, or refuse it."""
    where = f"{path} has a corrupt safetensors header: tensor {name!r}"
    if not isinstance(entry, dict) or not {"dtype", "shape", "data_offsets"} <= entry.keys():
        raise InputError(f"{where} needs dtype, shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in STORAGE:
        raise InputError(f"{path}: tensor {name!r} has dtype {dtype!r}; allowed: {', '.join(STORAGE)}")
    if not is_shape(shape):
        raise InputError(f"{where} has shape {shape!r}")
    if not (isinstance(offsets, list) and len(offsets) == 2 and all(map(is_count, offsets))):
        raise InputError(f"{where} has data_offsets {offsets!r}")
    info = TensorInfo(name, dtype, tuple(shape), path)
    begin, end = offsets
    if end - begin != info.nbytes:
        raise InputError(f"{where} of {dtype} {info.shape} needs {info.nbytes} bytes but spans {end - begin}")
    return begin, end, info


def write_safetensors(
    path: str | os.PathLike,
    tensors: Iterable[tuple[str, RawTensor | LazyTensor]],
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write a safetensors file, whole or not at all.

    Args:
        path: the file; an earlier one is replaced.
        tensors: names and values. A ``LazyTensor`` is fetched when its turn comes and let go after it.
        metadata: text entries of the header; default ``{"format": "pt"}``, which transformers asks for.

    Raises:
        InputError: a name occurs twice, or the file can't be written.
    """
    with atomic_write(path) as file:
        for _ in stream_safetensors(file, tensors, metadata):
            pass


def stream_safetensors(
    file: IO[bytes],
    tensors: Iterable[tuple[str, RawTensor | LazyTensor]],
    metadata: Mapping[str, str] | None = None,
) -> Iterator[tuple[str, int]]:
    """Write into an open file; yield each tensor's name and number of bytes after it is written."""
    # Wide dtypes first: every tensor is then aligned to its element size, as readers that map files expect.
    entries = sorted(tensors, key=lambda item: (-element_size(item[1].dtype), item[0]))
    file.write(_header(entries, {"format": "pt"} if metadata is None else metadata))
    for name, tensor in entries:
        written = 0
        for part in tensor.parts():
            view = memoryview(part.data)
            for start in range(0, part.nbytes, _WRITE_CHUNK):
                file.write(view[start : start + _WRITE_CHUNK])
            written += part.nbytes
            if part.dtype != tensor.dtype:
                raise ValueError(f"{name}: promised {tensor.dtype}, got {part.dtype}")
        if written != tensor.nbytes:
            raise ValueError(f"{name}: promised {tensor.nbytes} bytes, got {written}")
        yield name, written


def _header(entries: list[tuple[str, RawTensor | LazyTensor]], metadata: Mapping[str, str]) -> bytes:
    """The length and the JSON, padded with blanks so that the data starts at a multiple of eight."""
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    position = 0
    for name, tensor in entries:
        if name in header:
            raise InputError(f"can't write two tensors named {name!r}")
        span = [position, position + tensor.nbytes]
        header[name] = {"dtype": tensor.dtype, "shape": list(tensor.shape), "data_offsets": span}
        position += tensor.nbytes
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode("utf-8")
    text += b" " * (-len(text) % 8)
    return _LENGTH.pack(len(text)) + text
