"""Folders of AdapterHub's `adapters` library, read into and written from what a PEFT-like folder holds."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np

from mindpeft.adapter_files import read_tensors, write_adapter
from mindpeft.config import CONFIG_NAME, PeftConfig
from mindpeft.errors import InputError
from mindpeft.files import read_json, write_json
from mindpeft.tuners.adapterhub_names import (
    FORMAT_VERSION,
    HEAD_NAMES,
    HERE,
    INVERTIBLE,
    about_base,
    base_keys,
    names_here,
    names_there,
    read_head,
    read_weights,
    write_weights,
)
from mindpeft.tuners.base import Tensors
from mindpeft.tuners.bottleneck import BottleneckConfig
from mindpeft.tuners.bottleneck_layers import UP

WEIGHT_NAMES = ("adapter.safetensors", "pytorch_adapter.bin")
HEAD_CONFIG_NAME = "head_config.json"
# Names of activations before there was a "version" in the file.
_FORMER_ACTIVATIONS = {"gelu": "gelu_new", "gelu_orig": "gelu"}
# Where the library's plain config differs from the defaults here, which are those of "seq_bn".
_LIBRARY_DEFAULTS = {"original_ln_before": False}
_PEFT_KEYS = {field.name for field in fields(PeftConfig)} | {"modules_to_save"}


def import_adapterhub(source: str | os.PathLike, folder: str | os.PathLike, prefix: str = "") -> None:
    """Turn a folder that the library wrote into one that ``PeftModel.from_pretrained`` reads.

    Args:
        source: holds ``adapter_config.json``, and ``adapter.safetensors`` or ``pytorch_adapter.bin``.
        folder: made if absent.
        prefix: put before the cells' names, such as "bert." for an adapter saved from a bare ``BertModel``
            that a model with a head shall get.

    Raises:
        InputError: see ``read_adapterhub``; or ``folder`` can't be written.
    """
    config, tensors = read_adapterhub(source, prefix)
    named = {config.CELL_PREFIX + name: value for name, value in tensors.items()}
    write_adapter(Path(folder), [(config, named)])


def export_adapterhub(
    source: str | os.PathLike, folder: str | os.PathLike, name: str = "default", **about: Any
) -> None:
    """Turn a folder of ours into one that the library's ``load_adapter`` reads.

    Its weights are ``adapter.safetensors``, so load it with ``use_safetensors=True``.

    Args:
        source: written by ``PeftModel.save_pretrained``, with ``peft_type`` BOTTLENECK.
        folder: made if absent.
        name: what to call the adapter.
        about: ``model_type``, ``model_class``, ``model_name`` of the base model, which the library notes but
            does not need.

    Raises:
        InputError: it is another method's adapter, files are missing or damaged, or ``folder`` can't be
            written.
    """
    config = BottleneckConfig.from_pretrained(source)
    write_adapterhub(folder, config, read_tensors(source, config), name, **about)


def read_adapterhub(folder: str | os.PathLike, prefix: str = "") -> tuple[BottleneckConfig, Tensors]:
    """Read a folder that the library wrote.

    Args:
        folder: see ``import_adapterhub``.
        prefix: see there.

    Returns:
        the config, and the tensors as ``mindpeft.adapter_files.read_tensors`` gives them.

    Raises:
        InputError: files are missing or damaged, or hold something else than a bottleneck adapter.
    """
    folder = Path(folder)
    content = read_content(folder)
    try:
        config, tensors = read_bottleneck(content, read_weights(folder, WEIGHT_NAMES), prefix)
    except InputError as error:
        raise InputError(f"{folder}: {error}") from error
    head = read_head(folder)
    config.modules_to_save = sorted({name.rpartition(".")[0] for name in head}) or None
    return config, tensors | head


def read_content(folder: Path, name: str = CONFIG_NAME) -> dict[str, Any]:
    """The library's config of a folder with what is around it."""
    content = read_json(folder / name)
    if not isinstance(content, dict) or not isinstance(content.get("config"), dict):
        raise InputError(f'{folder / name} is not from AdapterHub: it has no "config" with keys')
    return content


def read_bottleneck(
    content: Mapping[str, Any], weights: Tensors, prefix: str
) -> tuple[BottleneckConfig, Tensors]:
    """The config and the tensors by their names here, of the library's; see ``read_adapterhub``."""
    config = _read_config(content, any(map(INVERTIBLE.fullmatch, weights)))
    tensors = names_here(weights, config.ln_before, prefix)
    if config.phm_layer and (config.shared_phm_rule or config.shared_W_phm) and _has_no_shared(tensors):
        raise InputError(
            "the file lacks the tensors that all layers share; the library leaves them out when it "
            "saves from a model without a head, so save from one with a head"
        )
    return config, tensors


def _read_config(content: Mapping[str, Any], is_invertible: bool) -> BottleneckConfig:
    """The library's config with what is around it.

    Args:
        content: the file's.
        is_invertible: the weights hold an invertible adapter.
    """
    keys = dict(content["config"])
    architecture = keys.pop("architecture", None)
    if architecture is not None:
        raise InputError(f"only bottleneck adapters are read, but its architecture is {architecture!r}")
    if "version" not in content:
        former = str(keys.get("non_linearity"))
        keys["non_linearity"] = _FORMER_ACTIVATIONS.get(former, former)
    earlier = keys.pop("invertible_adapter", None)
    if earlier:
        if not isinstance(earlier, dict) or not {"block_type", "reduction_factor"} <= earlier.keys():
            raise InputError(
                f"invertible_adapter must be an object with block_type and reduction_factor, not {earlier!r}"
            )
        keys["inv_adapter"] = earlier["block_type"]
        keys["inv_adapter_reduction_factor"] = earlier["reduction_factor"]
    if content.get("type") == "text_task" and not is_invertible:  # once named, though never there
        keys["inv_adapter"] = keys["inv_adapter_reduction_factor"] = None
    about = base_keys(content)
    return BottleneckConfig.from_dict(
        {**_LIBRARY_DEFAULTS, **keys, **about, "peft_type": BottleneckConfig.METHOD.value}
    )


def _has_no_shared(tensors: Iterable[str]) -> bool:
    return all("." in name for name in tensors)


def write_adapterhub(
    folder: str | os.PathLike,
    config: BottleneckConfig,
    tensors: Mapping[str, np.ndarray],
    name: str = "default",
    **about: Any,
) -> None:
    """Write a folder as the library does, the config last.

    Args:
        folder: made if absent.
        config: what the adapter is.
        tensors: as ``read_adapterhub`` gives them.
        name: what to call the adapter.
        about: see ``export_adapterhub``.

    Raises:
        InputError: the name can't be one, or the folder can't be written.
    """
    if not name or "." in name:
        raise InputError(f"{name!r} can't name an adapter in AdapterHub's format: it must have no dot")
    folder = Path(folder)
    places = {match["path"] for match in map(HERE.fullmatch, tensors) if match}
    if not places:
        raise InputError("there is nothing to write: the adapter has no tensors in any layer")
    base = min(places).partition("encoder.")[0]  # the base model's name in a model with a head
    weights, head = names_there(tensors, config.ln_before, name, base)
    keys = {key: value for key, value in config.to_dict().items() if key not in _PEFT_KEYS}
    outer = {"hidden_size": _hidden_size(tensors), "version": FORMAT_VERSION, **about_base(config), **about}
    write_weights(folder / WEIGHT_NAMES[0], weights)
    if head:
        write_weights(folder / HEAD_NAMES[0], head)
        if outer["model_class"]:  # else the library takes the head as it comes
            write_json(folder / HEAD_CONFIG_NAME, {**outer, "config": None, "name": None})
    write_json(folder / CONFIG_NAME, {**outer, "config": keys, "name": name})


def _hidden_size(tensors: Tensors) -> int | None:
    biases = (value for name, value in tensors.items() if name.endswith((f"{UP}.bias", f"{UP}.b")))
    return next((len(bias) for bias in biases), None)
