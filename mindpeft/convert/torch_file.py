"""Torch's `.bin` and `.pt` files, zip and legacy format, read tensor by tensor without torch."""

from __future__ import annotations

import io
import math
import os
import struct
import zipfile
from pathlib import Path
from typing import IO, Any

import numpy as np

from mindpeft.convert.safetensors_file import open_binary, read_bytes, row_range
from mindpeft.convert.tensors import STORAGE, RawTensor, TensorInfo, element_size
from mindpeft.convert.torch_pickle import StorageRef, TensorRef, state_dict, unpickle
from mindpeft.errors import InputError

ZIP_MAGIC = b"PK\x03\x04"
_LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
_LEGACY_PROTOCOL = 1001
_LOCAL_HEADER = struct.Struct("<4s22xHH")  # signature, length of name, length of extra field
_PICKLE_LIMIT = 1 << 28  # bytes; a state dict of 10,000 tensors needs about 2 MB
_EXPANSION_LIMIT = 1 << 28  # bytes that a tensor may have beyond its storage (strides of 0 repeat elements)

Spans = dict[str, tuple[int, int]]  # storage key -> first byte in the file, number of bytes


class TorchFile:
    """An open torch file whose tensors have been found, and checked to lie inside.

    Attributes:
        infos: what each tensor is.
        ignored: keys of entries that are no tensors.
        metadata: empty; torch files have none.

    Raises:
        InputError: the file can't be read, is damaged, or asks for anything but tensors and plain containers.
    """

    def __init__(self, path: str | os.PathLike) -> None:
        self.path = Path(path)
        self.metadata: dict[str, str] = {}
        self._file = open_binary(self.path)
        try:
            content, self._spans = _read_structure(self._file, self.path)
            self._tensors, self.ignored = state_dict(content, self.path)
            for name, tensor in self._tensors.items():
                self._check_bounds(name, tensor)
        except BaseException:
            self.close()
            raise
        self.infos = {
            name: TensorInfo(name, tensor.dtype, tensor.shape, self.path)
            for name, tensor in self._tensors.items()
        }

    def read(self, name: str, start: int = 0, stop: int | None = None) -> RawTensor:
        """Read one tensor into fresh contiguous memory, or its leading rows ``start:stop`` alone."""
        info, tensor = self.infos[name], self._tensors[name]
        first_byte = self._first_byte(tensor)
        if tensor.is_contiguous:
            shape, skipped, nbytes = row_range(info, start, stop)
            return RawTensor(
                info.dtype, shape, read_bytes(self._file, first_byte + skipped, nbytes, self.path)
            )
        if start or stop is not None:
            first, last, _ = slice(start, stop).indices(info.shape[0])
            first_byte += first * tensor.stride[0] * element_size(info.dtype)
            tensor = tensor._replace(shape=(max(last - first, 0), *info.shape[1:]))
        return self._read_strided(tensor, first_byte)

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def _read_strided(self, tensor: TensorRef, first_byte: int) -> RawTensor:
        storage_dtype = STORAGE[tensor.dtype]
        block = read_bytes(self._file, first_byte, tensor.extent * storage_dtype.itemsize, self.path)
        strides = [step * storage_dtype.itemsize for step in tensor.stride]
        view = np.lib.stride_tricks.as_strided(block.view(storage_dtype), tensor.shape, strides)
        flat = np.ascontiguousarray(view).reshape(-1)
        return RawTensor(tensor.dtype, tensor.shape, flat.view(np.uint8))

    def _first_byte(self, tensor: TensorRef) -> int:
        start, _ = self._spans[tensor.storage.key]
        in_storage = tensor.storage.first * element_size(tensor.storage.dtype)
        return start + in_storage + tensor.offset * element_size(tensor.dtype)

    def _check_bounds(self, name: str, tensor: TensorRef) -> None:
        """Refuse a tensor that leaves its storage, or that repeats elements without measure."""
        _, span = self._spans[tensor.storage.key]
        unit = element_size(tensor.storage.dtype)
        if (tensor.storage.first + tensor.storage.size) * unit > span:
            raise InputError(
                f"{self.path} is truncated or damaged: the storage of tensor {name!r} is too short"
            )
        held = tensor.storage.size * unit
        if (tensor.offset + tensor.extent) * element_size(tensor.dtype) > held and tensor.extent:
            raise InputError(f"{self.path} is damaged: tensor {name!r} reaches outside of its storage")
        nbytes = math.prod(tensor.shape) * element_size(tensor.dtype)
        if nbytes > held + _EXPANSION_LIMIT:
            raise InputError(f"{self.path}: tensor {name!r} expands {held} bytes to {nbytes}; refused")


def _read_structure(file: IO[bytes], path: Path) -> tuple[Any, Spans]:
    """Return the unpickled content, and where each storage lies in the file."""
    size = os.fstat(file.fileno()).st_size
    if size == 0:
        raise InputError(f"{path} is empty")
    is_zip = file.read(len(ZIP_MAGIC)) == ZIP_MAGIC
    file.seek(0)
    return _read_zip(file, path, size) if is_zip else _read_legacy(file, path, size)


def _read_zip(file: IO[bytes], path: Path, size: int) -> tuple[Any, Spans]:
    """The format of torch 1.6 and later: a pickle and one stored entry for each storage."""
    try:
        entries = {entry.filename: entry for entry in zipfile.ZipFile(file).infolist()}
    except Exception as error:  # a damaged archive can fail in any way
        raise InputError(f"{path} is truncated or damaged: not a whole zip archive ({error})") from error
    pickles = [name for name in entries if name.rpartition("/")[2] == "data.pkl" and name.count("/") < 2]
    if len(pickles) != 1:
        raise InputError(f"{path} is a zip archive, but not of torch: it has {len(pickles)} entries data.pkl")
    prefix = pickles[0].removesuffix("data.pkl")
    if prefix + "byteorder" in entries:
        order = _entry_bytes(file, entries[prefix + "byteorder"], path, size)
        if order != b"little":
            raise InputError(f"{path} was written on a machine of byte order {order!r}; only little is read")
    content, storages = unpickle(io.BytesIO(_entry_bytes(file, entries[pickles[0]], path, size)), path)
    spans = {}
    for key in storages:
        name = f"{prefix}data/{key}"
        if name not in entries:
            raise InputError(f"{path} is damaged: its entry {name} is missing")
        spans[key] = _entry_span(file, entries[name], path, size)
    return content, spans


def _entry_bytes(file: IO[bytes], entry: zipfile.ZipInfo, path: Path, size: int) -> bytes:
    start, nbytes = _entry_span(file, entry, path, size)
    if nbytes > _PICKLE_LIMIT:
        raise InputError(f"{path}: its entry {entry.filename} has {nbytes} bytes, more than {_PICKLE_LIMIT}")
    return read_bytes(file, start, nbytes, path).tobytes()


def _entry_span(file: IO[bytes], entry: zipfile.ZipInfo, path: Path, size: int) -> tuple[int, int]:
    """First byte and length of an entry's data. Torch never compresses them, and others are refused."""
    if entry.compress_type != zipfile.ZIP_STORED or entry.flag_bits & 1:
        raise InputError(
            f"{path}: its entry {entry.filename} is compressed; torch stores entries as they are"
        )
    misplaced = InputError(f"{path} is truncated or damaged: its entry {entry.filename} is out of place")
    if not 0 <= entry.header_offset <= size - _LOCAL_HEADER.size:
        raise misplaced
    header = read_bytes(file, entry.header_offset, _LOCAL_HEADER.size, path)
    signature, name_length, extra_length = _LOCAL_HEADER.unpack(header)
    start = entry.header_offset + _LOCAL_HEADER.size + name_length + extra_length
    if signature != ZIP_MAGIC or start + entry.file_size > size:
        raise misplaced
    return start, entry.file_size


def _read_legacy(file: IO[bytes], path: Path, size: int) -> tuple[Any, Spans]:
    """The format before torch 1.6: five pickles, then each storage as its size and its bytes."""
    magic, _ = unpickle(file, path)
    if magic != _LEGACY_MAGIC:
        raise InputError(f"{path} is no torch file: neither a zip archive nor the legacy format")
    protocol, _ = unpickle(file, path)
    system, _ = unpickle(file, path)
    if protocol != _LEGACY_PROTOCOL or not isinstance(system, dict):
        raise InputError(f"{path} is of an unknown version of torch's legacy format: {protocol!r}")
    if system.get("little_endian") is not True:
        raise InputError(f"{path} was written on a big-endian machine; only little-endian files are read")
    content, storages = unpickle(file, path)
    keys, _ = unpickle(file, path)
    if not isinstance(keys, list):
        raise InputError(f"{path} is damaged: its list of storages is missing")
    return content, _legacy_spans(file, path, size, [str(key) for key in keys], storages)


def _legacy_spans(
    file: IO[bytes], path: Path, size: int, keys: list[str], storages: dict[str, StorageRef]
) -> Spans:
    spans = {}
    for key in keys:
        count = int.from_bytes(file.read(8), "little", signed=True)
        if key not in storages or count < 0:
            raise InputError(f"{path} is damaged: storage {key!r} is unknown or malformed")
        nbytes = count * element_size(storages[key].dtype)
        start = file.tell()
        if start + nbytes > size:
            raise InputError(f"{path} is truncated: it ends inside storage {key!r}")
        spans[key] = start, nbytes
        file.seek(start + nbytes)
    if missing := storages.keys() - spans.keys():
        raise InputError(f"{path} is damaged: storage {min(missing)!r} is missing")
    return spans
