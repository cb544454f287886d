"""Adapter folders in Hugging Face PEFT's format, and the one map between file names and parameters.

base_model.model.<path>.lora_A.weight      a tensor of the slot of the wrapped cell <path>
base_model.model.<path>.base_layer.bias    the wrapped cell's own parameter, when it was trained or saved
base_model.model.<path>.weight             a parameter of the base model (a saved head, a trained bias)

A hybrid adapter, which has several methods, is a folder with one such folder for each of them and an index,
``hybrid.json``: ``{"parts": ["0-lora", "1-bitfit"]}``.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

import numpy as np

from mindpeft.config import CONFIG_NAME, PeftConfig
from mindpeft.convert.checkpoint import Checkpoint, open_checkpoint
from mindpeft.convert.safetensors_file import write_safetensors
from mindpeft.convert.tensors import FLOATS, RawTensor
from mindpeft.errors import InputError
from mindpeft.files import read_json, write_json
from mindpeft.parameters import Place

WEIGHT_NAMES = ("adapter_model.safetensors", "adapter_model.bin")  # in PEFT's order
HYBRID_INDEX = "hybrid.json"
_LONGEST_NAME = 255  # bytes, in common file systems
_BASE_LAYER = "base_layer"
# PEFT's own wrapper of a saved cell, whose parameters leak into the file with bias="all".
_STRAY_HOLDERS = ("original_module", "modules_to_save")


def own_name(name: str, wrapped: Iterable[str]) -> str:
    """The file's name of a base parameter, given the paths of the cells that the adapter wraps."""
    path, _, leaf = name.rpartition(".")
    return f"{path}.{_BASE_LAYER}.{leaf}" if path in wrapped else name


def base_name(name: str) -> str:
    """The base parameter that a file's name stands for: the reverse of ``own_name``."""
    return name.replace(f".{_BASE_LAYER}.", ".")


def is_stray(name: str) -> bool:
    """Whether PEFT wrote this tensor by accident: a twin of a saved cell's parameter, told by its holder."""
    return any(f".{holder}." in f".{name}" for holder in _STRAY_HOLDERS)


def stray_names(biases: Iterable[str], saved: Iterable[str]) -> Iterator[tuple[str, str, bool]]:
    """The twins that PEFT writes of saved cells' biases with bias="all".

    Yields:
        the file's name, the base parameter's name, and whether it holds the base model's own value.
    """
    for module in saved:
        for name in biases:
            if name.startswith(f"{module}."):
                rest = name[len(module) + 1 :]
                for holder in _STRAY_HOLDERS:
                    yield f"{module}.{holder}.{rest}", name, holder == "original_module"


def check_adapter_name(name: str) -> None:
    """Raise ``InputError`` unless an adapter's name can be a folder's, which it becomes."""
    if not name or name in (".", "..") or Path(name).name != name:
        raise InputError(f"{name!r} can't name an adapter: it must be usable as a folder name")


def adapter_folder(folder: str | os.PathLike, adapter_name: str) -> Path:
    """Where PEFT keeps an adapter: "default" in the folder itself, others in a sub-folder of their name."""
    return Path(folder) if adapter_name == "default" else Path(folder) / adapter_name


def write_adapter(folder: Path, parts: list[tuple[PeftConfig, Mapping[str, np.ndarray]]]) -> None:
    """Write an adapter: its one part into the folder itself, or several into sub-folders, the index last.

    Args:
        folder: made if absent.
        parts: the config and the tensors, by their names in the file, of each method.

    Raises:
        InputError: the folder can't be written.
    """
    if len(parts) == 1:
        _write_part(folder, *parts[0])
        return
    names = [f"{index}-{config.peft_type.value.lower()}" for index, (config, _) in enumerate(parts)]
    for name, part in zip(names, parts, strict=True):
        _write_part(folder / name, *part)
    write_json(folder / HYBRID_INDEX, {"parts": names})


def read_adapter(folder: str | os.PathLike) -> tuple[list[PeftConfig], list[dict[str, np.ndarray]]]:
    """Read an adapter's configs and tensors, one of each for each of its methods; see ``read_tensors``.

    Raises:
        InputError: a file is missing or damaged.
    """
    folders = part_folders(folder)
    configs = [PeftConfig.from_pretrained(part) for part in folders]
    return configs, [read_tensors(part, config) for part, config in zip(folders, configs, strict=True)]


def is_adapter(folder: Path) -> bool:
    """Whether a folder holds an adapter, a hybrid one included."""
    return (folder / CONFIG_NAME).is_file() or (folder / HYBRID_INDEX).is_file()


def part_folders(folder: str | os.PathLike) -> list[Path]:
    """The folders of an adapter's methods: itself, or those that a hybrid's index names.

    Raises:
        InputError: the index is damaged.
    """
    folder = Path(folder)
    if not (folder / HYBRID_INDEX).is_file():
        return [folder]
    index = read_json(folder / HYBRID_INDEX)
    names = index.get("parts") if isinstance(index, dict) else None
    if not isinstance(names, list) or not names or not all(is_plain_name(name) for name in names):
        raise InputError(
            f'{folder / HYBRID_INDEX} must be {{"parts": [...]}} with the names of folders beside it'
        )
    if len(set(names)) < len(names):
        raise InputError(f"{folder / HYBRID_INDEX} names a folder twice; each part must have its own")
    return [folder / name for name in names]


def is_plain_name(name: Any) -> bool:
    """Whether something from a file may name a file or folder beside it."""
    if not isinstance(name, str) or name in ("", ".", "..") or len(os.fsencode(name)) > _LONGEST_NAME:
        return False
    return "\0" not in name and PurePosixPath(name).name == name and PureWindowsPath(name).name == name


def _write_part(folder: Path, config: PeftConfig, tensors: Mapping[str, np.ndarray]) -> None:
    """Write one method's two files, the config last, so that a folder with a config is complete."""
    named = ((name, RawTensor.from_numpy(value)) for name, value in tensors.items())
    write_safetensors(folder / WEIGHT_NAMES[0], named)
    config.save_pretrained(folder)


def read_tensors(folder: str | os.PathLike, config: PeftConfig) -> dict[str, np.ndarray]:
    """Read an adapter's tensors, bfloat16 widened to float32, by their names without the config's prefixes.

    Raises:
        InputError: no weights file, a damaged one, or tensors of something that is no adapter of a cell.
    """
    with _opened(folder, config) as (checkpoint, names):
        tensors = {short: checkpoint[name].numpy() for short, name in names.items()}
    try:
        return config.from_file(tensors)
    except InputError as error:
        raise InputError(f"{weights_file(folder)}: {error}") from error


def tensor_shapes(folder: str | os.PathLike, config: PeftConfig) -> dict[str, tuple[int, ...]]:
    """The shapes of the tensors that ``read_tensors`` gives, without reading them. Raises as it does."""
    with _opened(folder, config) as (checkpoint, names):
        return {short: tuple(checkpoint.info(name).shape) for short, name in names.items()}


def weights_file(folder: str | os.PathLike) -> Path:
    """The file of an adapter's tensors. Raises ``InputError`` if there is none."""
    path = next((Path(folder) / name for name in WEIGHT_NAMES if (Path(folder) / name).is_file()), None)
    if path is None:
        raise InputError(f"{folder} holds no adapter: neither {' nor '.join(WEIGHT_NAMES)} is there")
    return path


@contextmanager
def _opened(folder: str | os.PathLike, config: PeftConfig) -> Iterator[tuple[Checkpoint, dict[str, str]]]:
    """An adapter's file of tensors, and the names in it by those without the config's prefixes."""
    path = weights_file(folder)
    prefixes = (config.CELL_PREFIX, config.SHARED_PREFIX)
    with open_checkpoint(path) as checkpoint:
        foreign = [name for name in checkpoint if not name.startswith(prefixes)]
        if foreign:
            raise InputError(
                f"{path}: tensor names must start with {prefixes[0]!r}, but {shortened(foreign)} does not"
            )
        check_floats(checkpoint, (n for n in checkpoint if n.rpartition(".")[2] not in config.WHOLE_NUMBERS))
        yield checkpoint, {_without(prefixes, name): name for name in checkpoint}


def check_floats(checkpoint: Checkpoint, names: Iterable[str]) -> None:
    """Raise ``InputError`` unless these tensors hold floating-point numbers."""
    for name in names:
        dtype = checkpoint.info(name).dtype
        if dtype not in FLOATS:
            allowed = ", ".join(sorted(FLOATS))
            raise InputError(f"{checkpoint.path}: {name!r} has dtype {dtype}; an adapter's are {allowed}")


def _without(prefixes: Iterable[str], name: str) -> str:
    """A name without the first of the prefixes that it has."""
    return name.removeprefix(next(prefix for prefix in prefixes if name.startswith(prefix)))


def shortened(names: Iterable[str], quote: bool = True, count: int = 3) -> str:
    """The first few names, and how many more there are."""
    names = [repr(name) if quote else name for name in names]
    more = f" and {len(names) - count} more" if len(names) > count else ""
    return ", ".join(names[:count]) + more


def sort_tensors(
    tensors: Mapping[str, np.ndarray],
    slots: Mapping[str, tuple[int, ...]],
    places: Mapping[str, Place],
    required: Iterable[str],
) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Sort a file's tensors into those of the slots and those that replace base parameters.

    Args:
        tensors: by their names without the prefix, as from ``read_tensors``.
        slots: name -> shape of every tensor that the adapter must have.
        places: the base model's parameters.
        required: the base parameters that the file must hold as well.

    Returns:
        slot tensors by file name, and base parameters' values by base name.

    Raises:
        InputError: tensors of the wrong shape, missing tensors, or tensors that fit nowhere; all are counted.
    """
    found = {name: value for name, value in tensors.items() if name in slots}
    rest = {
        base_name(name): value for name, value in tensors.items() if name not in slots and not is_stray(name)
    }
    own = {name: value for name, value in rest.items() if name in places}
    shapes = {**slots, **{name: tuple(places[name].parameter.shape) for name in own}}
    wrong = [
        f"{name!r} is {value.shape} in the file and {shapes[name]} in the model"
        for name, value in {**found, **own}.items()
        if value.shape != shapes[name]
    ]
    missing = [
        *(name for name in slots if name not in found),
        *(name for name in required if name not in own),
    ]
    problems = [
        f"{label} {shortened(names, quote)}"
        for label, names, quote in (
            ("tensors of another shape (is it for another base model?):", wrong, False),
            ("tensors missing from the file:", missing, True),
            ("tensors that the model has no place for:", [name for name in rest if name not in places], True),
        )
        if names
    ]
    if problems:
        raise InputError("the adapter does not fit this model: " + "; ".join(problems))
    return found, own
