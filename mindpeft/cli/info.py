"""``mindpeft info``: what a checkpoint or an adapter is, without loading it."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from mindpeft.console import out
from mindpeft.errors import InputError

if TYPE_CHECKING:
    from mindpeft.convert.checkpoint import Checkpoint

_MODEL_CONFIG = "config.json"
_LABELS_SHOWN = 20
_SIZES = ("num_hidden_layers", "hidden_size", "num_attention_heads", "vocab_size", "max_position_embeddings")
_METHOD_KEYS = ("r", "lora_alpha", "lora_dropout", "bias", "use_rslora", "modules_to_save")


def info(
    path: Annotated[Path | None, typer.Argument(help="A checkpoint, an adapter or a run.")] = None,
    env: Annotated[bool, typer.Option("--env", help="Versions and devices of this machine.")] = False,
    base: Annotated[
        Path | None, typer.Option(help="The base model's folder: put the adapter into it, and look there.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object instead of a table.")] = False,
) -> None:
    """Tell what a checkpoint or an adapter is: architecture, parameters, dtype, method, targets, size.

    For an adapter also what it puts where, layers that are alike in one line.

    \b
    Examples:
      mindpeft info bert-base
      mindpeft info my-run --json
      mindpeft info my-run --base bert-base
      mindpeft info --env
    """
    if (path is None) == (not env):
        raise InputError("give a path, or --env")
    if base is not None and env:
        raise InputError("--base is for an adapter, and --env is none")
    facts = _environment() if env else _describe(path, base)
    if as_json:
        out.print(json.dumps(facts, ensure_ascii=False), markup=False, soft_wrap=True)
        return
    injected = facts.pop("injected", None)
    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in facts.items():
        table.add_row(name.replace("_", " "), _words(value))
    out.print(table, markup=False)
    if injected:
        from mindpeft.cli.injected import as_table

        out.print()
        out.print(as_table(injected), markup=False)


def _words(value: Any) -> str:
    if isinstance(value, list):
        more = f" and {len(value) - _LABELS_SHOWN} more" if len(value) > _LABELS_SHOWN else ""
        return ", ".join(str(item) for item in value[:_LABELS_SHOWN]) + more
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)


def _environment() -> dict[str, Any]:
    from importlib.metadata import version

    from mindpeft.device import device_report

    return {"mindpeft": version("mindpeft"), **device_report()}


def _describe(path: Path, base: Path | None) -> dict[str, Any]:
    from mindpeft.adapter_files import is_adapter

    if not path.exists():
        raise InputError(f"no such file or folder: {path}")
    if is_adapter(path):
        return _describe_adapter(path) | {"injected": _injected(path, base)}
    if base is not None:
        raise InputError(f"--base is for an adapter, and {path} is none")
    return _describe_checkpoint(path)


def _injected(path: Path, base: Path | None) -> list[dict[str, Any]]:
    """What an adapter puts where: in that base model, or as its files say."""
    from mindpeft.cli.injected import from_files, from_model

    if base is None:
        return [found.row() for found in from_files(path)]
    from mindpeft.cli.run_folder import open_run

    return [found.row() for found in from_model(open_run(path, base).model)]


def _describe_checkpoint(path: Path) -> dict[str, Any]:
    from mindpeft.convert.checkpoint import open_checkpoint
    from mindpeft.files import read_json

    facts: dict[str, Any] = {"kind": "checkpoint", "path": str(path)}
    config = read_json(path / _MODEL_CONFIG) if (path / _MODEL_CONFIG).is_file() else {}
    if not isinstance(config, dict):
        raise InputError(f"{path / _MODEL_CONFIG} must hold a JSON object")
    facts |= {
        key: config[key] for key in ("model_type", "architectures", *_SIZES) if config.get(key) is not None
    }
    with open_checkpoint(path) as checkpoint:
        facts |= _tensors(checkpoint)
    if isinstance(config.get("id2label"), dict):
        facts["labels"] = list(config["id2label"].values())
    return facts


def _describe_adapter(path: Path) -> dict[str, Any]:
    from mindpeft.adapter_files import part_folders, weights_file
    from mindpeft.config import PeftConfig
    from mindpeft.convert.checkpoint import open_checkpoint
    from mindpeft.data.label_map import LabelMap

    folders = part_folders(path)
    parts = [PeftConfig.from_pretrained(folder).to_dict() for folder in folders]
    facts: dict[str, Any] = {
        "kind": "adapter",
        "path": str(path),
        "method": " + ".join(values["peft_type"] for values in parts),
        "task_type": parts[0]["task_type"],
        "base_model": parts[0]["base_model_name_or_path"],
    }
    for key in ("target_modules", *_METHOD_KEYS):
        found = [values[key] for values in parts if values.get(key) is not None]
        facts[key] = found[0] if len(found) == 1 else found or None
    totals: Counter[str] = Counter()
    for folder in folders:
        with open_checkpoint(weights_file(folder)) as checkpoint:
            found = _tensors(checkpoint)
        totals.update({key: found[key] for key in ("parameters", "tensors", "size_mib")})
        facts["dtype"], facts["files"] = found["dtype"], [*facts.get("files", []), *found["files"]]
    facts |= {key: round(value, 1) for key, value in totals.items()}
    if (path / "labels.json").is_file():
        facts["labels"] = list(LabelMap.load(path / "labels.json").names)
    return {key: value for key, value in facts.items() if value is not None}


def _tensors(checkpoint: Checkpoint) -> dict[str, Any]:
    counts: Counter[str] = Counter()
    for name in checkpoint.names():
        tensor = checkpoint.info(name)
        counts[tensor.dtype] += tensor.size
    return {
        "parameters": checkpoint.parameters,
        "tensors": len(checkpoint),
        "dtype": ", ".join(dtype for dtype, _ in counts.most_common()),
        "size_mib": round(checkpoint.total_bytes / 2**20, 1),
        "files": [file.name for file in checkpoint.files],
    }
