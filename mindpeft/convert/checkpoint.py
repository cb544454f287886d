"""One read-only view of a checkpoint, whatever its files: a mapping from tensor names to tensors."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any, Protocol

from mindpeft.convert.mindspore_file import MindSporeFile
from mindpeft.convert.safetensors_file import SafetensorsFile, open_binary
from mindpeft.convert.tensors import (
    RawTensor,
    TensorInfo,
    convert_into,
    dtype_name,
    element_size,
    empty_bytes,
)
from mindpeft.convert.torch_file import ZIP_MAGIC, TorchFile
from mindpeft.errors import InputError, did_you_mean
from mindpeft.files import read_json

WEIGHT_NAMES = (  # in Hugging Face's order
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
# Bytes read at a time. Of this size, memory that was let go is used again; larger blocks come from the system
# each time, which clears them page by page, and takes longer than reading.
_CHUNK = 1 << 23


class TensorFile(Protocol):
    """What every reader of one file offers."""

    path: Path
    infos: dict[str, TensorInfo]
    metadata: dict[str, str]
    ignored: list[str]

    def read(self, name: str, start: int = 0, stop: int | None = None) -> RawTensor: ...

    def close(self) -> None: ...


class Checkpoint(Mapping[str, RawTensor]):
    """The tensors of a checkpoint, each read from its file, or mapped, when asked for. A context manager.

    Attributes:
        path: what was opened.
        files: the files that hold the tensors.
        metadata: text entries of the files' headers.
        ignored: entries of the files that are no tensors (an epoch number, say).
    """

    def __init__(self, path: Path, files: list[TensorFile], holder: dict[str, TensorFile]) -> None:
        self.path = path
        self._open_files = files
        self._holder = holder
        self.files = [file.path for file in files]
        self.metadata = {key: text for file in files for key, text in file.metadata.items()}
        self.ignored = [entry for file in files for entry in file.ignored]

    def names(self) -> list[str]:
        """The names of the tensors."""
        return list(self._holder)

    def info(self, name: str) -> TensorInfo:
        """What is known of a tensor without reading it.

        Raises:
            InputError: there is no such tensor.
        """
        return self._file_of(name).infos[name]

    def read(self, name: str, dtype: Any = None) -> RawTensor:
        """Read a tensor into fresh memory, in its own dtype or converted piece by piece to ``dtype``.

        Raises:
            InputError: there is no such tensor, or its file is damaged.
        """
        file = self._file_of(name)
        info = file.infos[name]
        target = info.dtype if dtype is None else dtype_name(dtype)
        return file.read(name) if target == info.dtype else _read_converted(file, info, target)

    def mapped(self, name: str) -> RawTensor | None:
        """A tensor as pages of its file, which take memory when touched; see `SafetensorsFile.map`.

        Returns:
            The tensor, in its own dtype; None where it can't be mapped.

        Raises:
            InputError: there is no such tensor, or its file has been cut since it was opened.
        """
        file = self._file_of(name)
        return file.map(name) if isinstance(file, SafetensorsFile) else None

    def pieces(self, name: str, dtype: Any = None) -> Iterator[RawTensor]:
        """The rows of a tensor, some at a time, so that it is never held whole; as `read` gives them.

        Raises:
            InputError: there is no such tensor, or its file is damaged.
        """
        file = self._file_of(name)
        info = file.infos[name]
        target = info.dtype if dtype is None else dtype_name(dtype)
        for start, stop in _row_ranges(info):
            piece = file.read(name, start, stop)
            yield piece if piece.dtype == target else piece.astype(target)

    @property
    def total_bytes(self) -> int:
        """The bytes of all tensors."""
        return sum(self.info(name).nbytes for name in self)

    @property
    def parameters(self) -> int:
        """The number of elements of all tensors."""
        return sum(self.info(name).size for name in self)

    def close(self) -> None:
        """Close the files."""
        for file in self._open_files:
            file.close()

    def _file_of(self, name: str) -> TensorFile:
        if name not in self._holder:
            raise InputError(f"{self.path} has no tensor {name!r}{did_you_mean(name, self._holder)}")
        return self._holder[name]

    def __getitem__(self, name: str) -> RawTensor:
        if name not in self._holder:
            raise KeyError(name)
        return self.read(name)

    def __contains__(self, name: object) -> bool:
        return name in self._holder

    def __iter__(self) -> Iterator[str]:
        return iter(self._holder)

    def __len__(self) -> int:
        return len(self._holder)

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def open_checkpoint(path: str | os.PathLike) -> Checkpoint:
    """Open a checkpoint for reading; no tensor is read yet.

    Args:
        path: a folder with one of ``WEIGHT_NAMES`` (the first present is taken), or a file: safetensors,
            torch's ``.bin`` / ``.pt``, MindSpore's ``.ckpt``, or an index of shards.

    Raises:
        InputError: nothing is there, a file is damaged, or an index names a file that is missing, outside the
            folder, or lacks a tensor it should hold.
    """
    path = Path(path)
    file = _find_weights(path) if path.is_dir() else path
    if not os.path.exists(file):
        raise InputError(f"no such file or folder: {path}")
    if file.name.endswith(".index.json"):
        return _open_index(path, file)
    opened = _open_file(file)
    return Checkpoint(path, [opened], dict.fromkeys(opened.infos, opened))


def _find_weights(folder: Path) -> Path:
    for name in WEIGHT_NAMES:
        if (folder / name).is_file():
            return folder / name
    raise InputError(f"{folder} holds no weights; looked for {', '.join(WEIGHT_NAMES)}")


def _open_file(path: Path) -> TensorFile:
    """Open one file by its kind. A `.ckpt` is MindSpore's, but torch's if it is a zip archive."""
    if path.suffix == ".safetensors":
        return SafetensorsFile(path)
    if path.suffix == ".ckpt" and not _is_zip(path):
        return MindSporeFile(path)
    return TorchFile(path)


def _is_zip(path: Path) -> bool:
    with open_binary(path) as file:
        return file.read(len(ZIP_MAGIC)) == ZIP_MAGIC


def _open_index(path: Path, index: Path) -> Checkpoint:
    """Open all shards of an index. Every shard's presence is checked before the first is opened."""
    weight_map = _read_weight_map(index)
    shards = dict.fromkeys(weight_map.values())
    for shard in shards:
        if not os.path.isfile(index.parent / shard):
            raise InputError(f"{index} names the file {shard}, which is missing")
    opened: dict[str, TensorFile] = {}
    try:
        for shard in shards:
            opened[shard] = _open_file(index.parent / shard)
        for name, shard in weight_map.items():
            if name not in opened[shard].infos:
                raise InputError(f"{index} places tensor {name!r} in {shard}, which doesn't hold it")
    except BaseException:
        for file in opened.values():
            file.close()
        raise
    return Checkpoint(
        path, list(opened.values()), {name: opened[shard] for name, shard in weight_map.items()}
    )


def _read_weight_map(index: Path) -> dict[str, str]:
    """The index's map from tensor names to file names, each inside the index's folder."""
    content = read_json(index)
    weight_map = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        raise InputError(f"{index} is no index: it needs a weight_map from tensor names to file names")
    for name, shard in weight_map.items():
        if not isinstance(shard, str) or not _stays_inside(shard):
            raise InputError(
                f"{index} places tensor {name!r} in {shard!r}, which is not a file of its folder"
            )
    return weight_map


def _stays_inside(name: str) -> bool:
    """Whether a name is a plain relative path, in POSIX and in Windows spelling alike."""
    paths = PurePosixPath(name), PureWindowsPath(name)
    return bool(name) and "\0" not in name and not any(path.anchor or ".." in path.parts for path in paths)


def _read_converted(file: TensorFile, info: TensorInfo, dtype: str) -> RawTensor:
    """Convert while reading, some rows at a time: the file's own dtype is never held whole."""
    result = RawTensor(dtype, info.shape, empty_bytes(info.size * element_size(dtype)))
    row = info.size // max(info.shape[0], 1) if info.shape else 0
    for start, stop in _row_ranges(info):
        convert_into(result, start * row, file.read(info.name, start, stop))
    return result


def _row_ranges(info: TensorInfo) -> Iterator[tuple[int, int | None]]:
    """Leading rows, from and to, of about ``_CHUNK`` bytes each; for a scalar the whole."""
    if not info.shape:
        yield 0, None
        return
    rows = max(_CHUNK * info.shape[0] // max(info.nbytes, 1), 1)
    for start in range(0, info.shape[0], rows):
        yield start, start + rows
