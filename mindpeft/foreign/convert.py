"""``convert_adapter``: an adapter in any readable format becomes a folder of PEFT's (or of AdapterHub's)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mindpeft.adapter_files import HYBRID_INDEX, read_adapter, read_tensors, write_adapter
from mindpeft.config import CONFIG_NAME, PeftConfig
from mindpeft.errors import InputError
from mindpeft.files import atomic_folder, read_json
from mindpeft.foreign.adapterhub import import_adapter
from mindpeft.foreign.lora import write_lora
from mindpeft.foreign.mindformers import read_mindformers
from mindpeft.foreign.mlx import is_mlx, read_mlx
from mindpeft.tuners.adapterhub_files import export_adapterhub
from mindpeft.tuners.adapterhub_fusion import export_fusion, import_fusion, is_fusion
from mindpeft.tuners.targeted import check_choice

FORMATS = ("peft", "adapterhub")
_ADAPTERHUB_KEYS = {"config", "model_type", "hidden_size"}


@dataclass(frozen=True)
class Conversion:
    """What was converted.

    Attributes:
        source_format: "peft", "adapterhub", "mlx" or "mindformers".
        target_format: one of ``FORMATS``.
        method: the ``peft_type`` of what was written.
        tensors: how many were read.
    """

    source_format: str
    target_format: str
    method: str
    tensors: int


def convert_adapter(
    source: str | Path,
    output: str | Path,
    *,
    to: str = "peft",
    lora_alpha: float | None = None,
    base_model: str | None = None,
    prefix: str = "",
) -> Conversion:
    """Read an adapter, whatever wrote it, and write it in another format.

    Args:
        source: a folder of Hugging Face PEFT, AdapterHub's ``adapters`` or mlx-lm, or a ``.ckpt`` of MindPet
            or mindformers.
        output: the folder to make; an earlier one is replaced.
        to: "peft", or "adapterhub" for bottleneck adapters and fusions of them.
        lora_alpha: of a ``.ckpt``, which does not say it.
        base_model: noted in the config where the source does not say it.
        prefix: put before the cells' names, such as "bert.", where the source was saved from a bare encoder.

    Returns:
        what was done.

    Raises:
        InputError: the format is not known, or the adapter has no equal in the other one; nothing is written.
    """
    source, output = Path(source), Path(output)
    check_choice("to", to, FORMATS)
    if to == "adapterhub" and (source / HYBRID_INDEX).is_file():
        with atomic_folder(output) as folder:
            export_fusion(source, folder)
        return Conversion("peft", to, *_method_and_count(source))
    kind, config = _detect(source)
    if to == "adapterhub":
        if kind != "peft" or config.get("peft_type") != "BOTTLENECK":
            raise InputError(
                f"{source} is no bottleneck adapter of mindpeft's: only those go into AdapterHub's format"
            )
        with atomic_folder(output) as folder:
            export_adapterhub(source, folder)
        return Conversion(kind, to, *_method_and_count(source))
    if kind == "adapterhub":
        return _from_adapterhub(source, output, prefix)
    if kind == "peft":
        return _rewritten(source, output, base_model)
    if kind == "mlx":
        updates, dropout = read_mlx(source, config)
        options = {
            "task_type": "CAUSAL_LM",
            "dropout": dropout,
            "base_model": base_model or config.get("model"),
        }
    else:
        updates, options = read_mindformers(source, lora_alpha), {"base_model": base_model}
    updates = {prefix + path: update for path, update in updates.items()}
    written = write_lora(output, updates, **options)
    return Conversion(
        kind, to, written.peft_type.value, sum(2 + (u.magnitude is not None) for u in updates.values())
    )


def _detect(source: Path) -> tuple[str, Mapping[str, Any]]:
    """The format of a source, and its ``adapter_config.json`` if it has one."""
    if source.is_file() and source.suffix == ".ckpt":
        return "mindformers", {}
    if not source.is_dir():
        raise InputError(f"no such folder, and no .ckpt file: {source}")
    if (source / HYBRID_INDEX).is_file():
        raise InputError(f"{source} is a hybrid: convert the folders in it one by one")
    if is_fusion(source):
        return "adapterhub", {}
    if not (source / CONFIG_NAME).is_file():
        raise InputError(f"{source} holds no {CONFIG_NAME}, so it is no adapter")
    config = read_json(source / CONFIG_NAME)
    if not isinstance(config, dict):
        raise InputError(f"{source / CONFIG_NAME} must hold a JSON object")
    if "peft_type" in config:
        return "peft", config
    if is_mlx(source, config):
        return "mlx", config
    if config.keys() >= _ADAPTERHUB_KEYS or isinstance(config.get("config"), dict):
        return "adapterhub", config
    raise InputError(
        f"{source / CONFIG_NAME} is of no known format: it has neither peft_type (PEFT), nor fine_tune_type "
        "(mlx-lm), nor config and model_type (AdapterHub)"
    )


def _rewritten(source: Path, output: Path, base_model: str | None) -> Conversion:
    """The same adapter again: ``.bin`` becomes safetensors, and the config gets today's keys."""
    config = PeftConfig.from_pretrained(source)
    tensors = read_tensors(source, config)
    config.base_model_name_or_path = base_model or config.base_model_name_or_path
    shared = {name for name in tensors if "." not in name}
    named = {
        (config.SHARED_PREFIX if name in shared else config.CELL_PREFIX) + name: value
        for name, value in tensors.items()
    }
    with atomic_folder(output) as folder:
        write_adapter(folder, [(config, named)])
    return Conversion("peft", "peft", config.peft_type.value, len(tensors))


def _from_adapterhub(source: Path, output: Path, prefix: str) -> Conversion:
    with atomic_folder(output) as folder:
        (import_fusion if is_fusion(source) else import_adapter)(source, folder, prefix)
        return Conversion("adapterhub", "peft", *_method_and_count(folder))


def _method_and_count(folder: Path) -> tuple[str, int]:
    """The methods of an adapter of ours, and how many tensors it has."""
    configs, tensors = read_adapter(folder)
    return " + ".join(config.peft_type.value for config in configs), sum(map(len, tensors))
