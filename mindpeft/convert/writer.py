"""Writing checkpoints in Hugging Face's layout, and converting one checkpoint into another folder."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

from mindpeft.convert.checkpoint import Checkpoint, open_checkpoint
from mindpeft.convert.safetensors_file import stream_safetensors
from mindpeft.convert.tensors import FLOATS, STORAGE, LazyTensor, RawTensor, dtype_name
from mindpeft.errors import InputError
from mindpeft.files import atomic_folder, atomic_write, read_json, write_json

Named = tuple[str, "RawTensor | LazyTensor"]
Progress = Callable[[str, int, int], None]

SINGLE_NAME = "model.safetensors"
INDEX_NAME = "model.safetensors.index.json"
_OWN_NAMES = re.compile(r"model(-\d{5}-of-\d{5})?\.safetensors|model\.safetensors\.index\.json")
_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*(?:([KMGT])(I?))?B?", re.IGNORECASE)
_POWERS = {None: 0, "K": 1, "M": 2, "G": 3, "T": 4}
_WEIGHT_SUFFIXES = (
    ".safetensors",
    ".bin",
    ".pt",
    ".pth",
    ".ckpt",
    ".h5",
    ".msgpack",
    ".onnx",
    ".gguf",
    ".index.json",
)
# What configs call each dtype.
_CONFIG_NAMES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}


def save_checkpoint(
    folder: str | os.PathLike,
    tensors: Iterable[Named],
    *,
    max_shard_size: int | str = "5GB",
    metadata: Mapping[str, str] | None = None,
    progress: Progress | None = None,
) -> list[Path]:
    """Write ``model.safetensors``, or numbered shards and their index.

    No file takes its final name before all are complete, the index comes last, and what an earlier save left
    under such names is removed.

    Args:
        folder: where to; made if absent.
        tensors: names and values. A ``LazyTensor`` is fetched when its turn comes and let go after it.
        max_shard_size: bytes, or text such as ``"5GB"``; a larger tensor gets a shard of its own.
        metadata: text entries of the files' headers; ``format`` is always ``"pt"``.
        progress: called after each tensor with its name, the bytes written so far and those in all.

    Returns:
        the files written.

    Raises:
        InputError: a name occurs twice, ``max_shard_size`` is no size, or the folder can't be written.
    """
    folder = Path(folder)
    shards = _plan_shards(tensors, parse_size(max_shard_size))
    header = {**(metadata or {}), "format": "pt"}
    total = sum(tensor.nbytes for shard in shards.values() for _, tensor in shard)
    done = 0
    with ExitStack() as renamed_in_reverse:
        if len(shards) > 1:
            index = renamed_in_reverse.enter_context(atomic_write(folder / INDEX_NAME, "w"))
            json.dump(_index(shards, total), index, indent=2, sort_keys=True, ensure_ascii=False)
        for file_name, shard in shards.items():
            file = renamed_in_reverse.enter_context(atomic_write(folder / file_name))
            for name, nbytes in stream_safetensors(file, shard, header):
                done += nbytes
                if progress is not None:
                    progress(name, done, total)
    written = [*shards, INDEX_NAME] if len(shards) > 1 else [*shards]
    _remove_stale(folder, keep=written)
    return [folder / name for name in written]


def parse_size(size: int | str) -> int:
    """Return a number of bytes; text takes decimal (``"5GB"``) or binary units (``"512MiB"``).

    Raises:
        InputError: it is no size, or not at least one byte.
    """
    match = _SIZE.fullmatch(str(size).strip())
    if match is not None:
        base = 1024 if match[3] else 1000
        nbytes = int(float(match[1]) * base ** _POWERS[match[2] and match[2].upper()])
        if nbytes > 0:
            return nbytes
    raise InputError(f"{size!r} is no size; give bytes or text such as '5GB' or '512MiB'")


def _plan_shards(tensors: Iterable[Named], limit: int) -> dict[str, list[Named]]:
    """Split the tensors, in order, into the files that will hold them."""
    shards: list[list[Named]] = [[]]
    names: set[str] = set()
    filled = 0
    for name, tensor in tensors:
        if name in names:
            raise InputError(f"can't write two tensors named {name!r}")
        names.add(name)
        if shards[-1] and filled + tensor.nbytes > limit:
            shards.append([])
            filled = 0
        shards[-1].append((name, tensor))
        filled += tensor.nbytes
    if len(shards) == 1:
        return {SINGLE_NAME: shards[0]}
    return {f"model-{i:05}-of-{len(shards):05}.safetensors": shard for i, shard in enumerate(shards, 1)}


def _index(shards: Mapping[str, list[Named]], total: int) -> dict[str, Any]:
    weight_map = {name: file_name for file_name, shard in shards.items() for name, _ in shard}
    return {"metadata": {"total_size": total}, "weight_map": weight_map}


def _remove_stale(folder: Path, keep: list[str]) -> None:
    for path in folder.iterdir():
        if _OWN_NAMES.fullmatch(path.name) and path.name not in keep:
            path.unlink()


def convert_checkpoint(
    src: str | os.PathLike,
    dst: str | os.PathLike,
    *,
    dtype: Any = None,
    max_shard_size: int | str = "5GB",
    overwrite: bool = False,
    progress: Progress | None = None,
) -> list[Path]:
    """Write a checkpoint again, as safetensors, into a folder of its own, one tensor at a time.

    The other files of a source folder (config.json, tokenizer, ...) come along; its other weights and its
    subfolders don't.

    Args:
        src: what ``open_checkpoint`` opens.
        dst: the folder to make; it appears whole or not at all.
        dtype: what floating-point tensors become; ``None`` keeps every bit.
        max_shard_size: as in ``save_checkpoint``.
        overwrite: replace ``dst``, with all it holds, if it isn't empty.
        progress: as in ``save_checkpoint``.

    Returns:
        the weight files written.

    Raises:
        InputError: ``src`` can't be read, ``dst`` isn't empty or holds ``src``, or can't be written.
    """
    src, dst = Path(src), Path(dst)
    target = None if dtype is None else float_dtype(dtype)
    parse_size(max_shard_size)
    _check_destination(src, dst, overwrite)
    with open_checkpoint(src) as checkpoint, atomic_folder(dst) as folder:
        if src.is_dir():
            _copy_companions(src, folder, target)
        written = save_checkpoint(
            folder,
            _lazily(checkpoint, target),
            max_shard_size=max_shard_size,
            metadata=checkpoint.metadata,
            progress=progress,
        )
    return [dst / path.name for path in written]


def float_dtype(dtype: Any) -> str:
    """Safetensors' name of a floating-point dtype.

    Raises:
        InputError: it is none.
    """
    name = dtype_name(dtype)
    if name not in FLOATS:
        allowed = ", ".join(known for known in STORAGE if known in FLOATS)
        raise InputError(f"weights can't become {name}; allowed: {allowed}")
    return name


def _check_destination(src: Path, dst: Path, overwrite: bool) -> None:
    source, place = src.resolve(), dst.resolve()
    if place == source or place in source.parents:
        raise InputError(f"the destination {dst} is or holds the source {src}; choose another folder")
    if dst.exists() and not dst.is_dir():
        raise InputError(f"the destination {dst} is a file; needed: a folder")
    if dst.is_dir() and not overwrite and any(dst.iterdir()):
        raise InputError(f"the destination {dst} is not empty; choose another folder, or ask to overwrite it")


def _lazily(checkpoint: Checkpoint, target: str | None) -> Iterator[Named]:
    for name in checkpoint.names():
        info = checkpoint.info(name)
        dtype = target if target is not None and info.dtype in FLOATS else info.dtype
        read = partial(checkpoint.read, name, dtype)
        yield name, LazyTensor(dtype, info.shape, read, partial(checkpoint.pieces, name, dtype))


def _copy_companions(src: Path, folder: Path, target: str | None) -> None:
    """Copy a checkpoint folder's plain files that are no weights; config.json learns the new dtype."""
    for path in src.iterdir():
        is_weights = path.name.endswith(_WEIGHT_SUFFIXES)
        if path.is_file() and not path.name.startswith(".") and not is_weights:
            shutil.copyfile(path, folder / path.name)
    config_path = folder / "config.json"
    if target is not None and config_path.exists():
        config = read_json(config_path)
        if isinstance(config, dict):
            known = {"dtype", "torch_dtype"} & config.keys() or {"dtype"}
            write_json(config_path, {**config, **dict.fromkeys(known, _CONFIG_NAMES[target])})
