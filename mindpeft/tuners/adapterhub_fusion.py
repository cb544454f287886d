"""AdapterFusion in the files of AdapterHub's `adapters` library: a folder for it, beside its adapters'.

bert.encoder.layer.0.output.adapter_fusion_layer.NAME.query.weight    there
base_model.model.bert.encoder.layer.0.output.adapter_fusion.query.weight    here

Here that is a hybrid: a part for each adapter, then the fusion.
"""

from __future__ import annotations

import os
import re
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np

from mindpeft.adapter_files import is_plain_name, part_folders, read_adapter, shortened, write_adapter
from mindpeft.config import PeftConfig
from mindpeft.errors import InputError
from mindpeft.files import write_json
from mindpeft.tuners.adapter_fusion import AdapterFusionConfig
from mindpeft.tuners.adapterhub_files import HEAD_CONFIG_NAME, read_adapterhub, read_content, write_adapterhub
from mindpeft.tuners.adapterhub_names import (
    FORMAT_VERSION,
    HEAD_NAMES,
    about_base,
    base_keys,
    read_head,
    read_weights,
    write_weights,
)
from mindpeft.tuners.base import Tensors
from mindpeft.tuners.fusion_layers import FIRST_TEMPERATURE, TEMPERATURE
from mindpeft.tuners.half_layers import follows_attention

FUSION_CONFIG_NAME = "adapter_fusion_config.json"
FUSION_WEIGHT_NAMES = ("model_adapter_fusion.safetensors", "pytorch_model_adapter_fusion.bin")
# The library's keys: those before the ones that say what is mixed.
_KEYS = [entry.name for entry in fields(AdapterFusionConfig) if entry.name not in PeftConfig.__annotations__]
_KEYS = _KEYS[: _KEYS.index("adapter_names")]
_THERE = re.compile(
    r"(?P<path>.+)\.adapter_fusion_layer\.(?P<name>[^.]+)\.(?P<leaf>(?:key|query|value)\.[^.]+)"
)
_HERE = re.compile(r"(?P<path>.+)\.adapter_fusion\.(?P<leaf>(?:key|query|value)\.[^.]+)")


def is_fusion(folder: Path) -> bool:
    """Whether the library wrote an AdapterFusion into a folder."""
    return (folder / FUSION_CONFIG_NAME).is_file()


def import_fusion(source: str | os.PathLike, folder: str | os.PathLike, prefix: str = "") -> None:
    """Turn a fusion that the library wrote into a hybrid that ``PeftModel.from_pretrained`` reads.

    Args:
        source: holds ``adapter_fusion_config.json`` and the fusion's weights; the folders of the adapters,
            called as they are, are beside it.
        folder: made if absent.
        prefix: see ``import_adapterhub``.

    Raises:
        InputError: files are missing or damaged, or don't fit together; or ``folder`` can't be written.
    """
    source = Path(source)
    config, tensors = read_fusion(source, prefix)
    parts: list[tuple[PeftConfig, Tensors]] = []
    for name in config.adapter_names:
        if not is_plain_name(name) or not (source.parent / name).is_dir():
            raise InputError(f"{source} mixes the adapter {name!r}, but there is no folder of it beside it")
        own, weights = read_adapterhub(source.parent / name, prefix)
        heads = tuple(f"{head}." for head in own.modules_to_save or ())
        own.modules_to_save = None
        parts.append((own, {key: value for key, value in weights.items() if not key.startswith(heads)}))
    config.frozen_parts([own for own, _ in parts])
    parts.append((config, tensors))
    write_adapter(
        Path(folder),
        [(own, {own.CELL_PREFIX + name: value for name, value in found.items()}) for own, found in parts],
    )


def read_fusion(folder: Path, prefix: str = "") -> tuple[AdapterFusionConfig, Tensors]:
    """Read the fusion alone, without its adapters; see ``import_fusion``."""
    content = read_content(folder, FUSION_CONFIG_NAME)
    try:
        tensors = _names_here(read_weights(folder, FUSION_WEIGHT_NAMES), prefix)
        names = content.get("adapter_names") or content.get("name")
        behind_attention = {follows_attention(name.partition(".adapter_fusion.")[0]) for name in tensors}
        about = {
            "peft_type": AdapterFusionConfig.METHOD.value,
            "adapter_names": names.split(",") if isinstance(names, str) else names,
            "mh_adapter": True in behind_attention,
            "output_adapter": False in behind_attention,
            **base_keys(content),
        }
        config = AdapterFusionConfig.from_dict({**content["config"], **about})
    except InputError as error:
        raise InputError(f"{folder}: {error}") from error
    if config.temperature:
        places = {name.partition(".adapter_fusion.")[0] for name in tensors}
        tensors |= {f"{path}.{TEMPERATURE}": np.full(1, FIRST_TEMPERATURE, np.float32) for path in places}
    head = read_head(folder)
    config.modules_to_save = sorted({name.rpartition(".")[0] for name in head}) or None
    return config, tensors | head


def _names_here(weights: Tensors, prefix: str) -> Tensors:
    matches = {key: _THERE.fullmatch(key) for key in weights}
    strange = [key for key, match in matches.items() if match is None]
    if strange or not weights:
        raise InputError(f"the weights hold tensors of no AdapterFusion: {shortened(strange) or 'none'}")
    names = sorted({match["name"] for match in matches.values()})
    if len(names) > 1:
        raise InputError(f"the weights hold several fusions: {shortened(names)}")
    return {
        f"{prefix}{match['path']}.adapter_fusion.{match['leaf']}": weights[key]
        for key, match in matches.items()
    }


def export_fusion(source: str | os.PathLike, folder: str | os.PathLike, **about: Any) -> None:
    """Turn a hybrid of ours into folders that the library's ``load_adapter`` and its like read.

    Args:
        source: written by ``PeftModel.save_pretrained``: bottleneck adapters, then an AdapterFusion.
        folder: made if absent; gets one folder for each adapter, and one for the fusion.
        about: see ``export_adapterhub``.

    Raises:
        InputError: it is another adapter, files are missing or damaged, or ``folder`` can't be written.
    """
    configs, tensors = read_adapter(source)
    fusion, mixed = configs[-1], configs[:-1]
    if not isinstance(fusion, AdapterFusionConfig):
        found = " and ".join(config.peft_type.value for config in configs)
        raise InputError(
            f"{source} is of {found} in {len(part_folders(source))} parts, but ends in no fusion"
        )
    fusion.frozen_parts(mixed)
    odd = [name for name in fusion.adapter_names if not is_plain_name(name) or "," in name]
    if odd:
        raise InputError(f"{odd[0]!r} can't name an adapter in AdapterHub's format: it names a folder")
    folder, name = Path(folder), ",".join(fusion.adapter_names)
    for adapter, config, values in zip(fusion.adapter_names, mixed, tensors, strict=False):
        write_adapterhub(folder / adapter, config, values, adapter, **about)
    matches = {key: _HERE.fullmatch(key) for key in tensors[-1] if not key.endswith(TEMPERATURE)}
    weights = {
        f"{match['path']}.adapter_fusion_layer.{name}.{match['leaf']}": tensors[-1][key]
        for key, match in matches.items()
        if match
    }
    head = {key: tensors[-1][key] for key, match in matches.items() if match is None}
    sizes = (value.shape[-1] for key, value in weights.items() if key.endswith("weight"))
    outer = {"hidden_size": next(sizes), "version": FORMAT_VERSION, **about_base(fusion), **about}
    write_weights(folder / name / FUSION_WEIGHT_NAMES[0], weights)
    if head:
        write_weights(folder / name / HEAD_NAMES[0], head)
        write_json(folder / name / HEAD_CONFIG_NAME, {**outer, "config": None, "name": None})
    keys = {key: value for key, value in fusion.to_dict().items() if key in _KEYS}
    names = {"adapter_names": fusion.adapter_names, "name": name}
    write_json(folder / name / FUSION_CONFIG_NAME, {**outer, **names, "config": keys})
