"""Adapters of mlx-lm: ``adapter_config.json`` (all its command's arguments) and ``adapters.safetensors``.

Tensors are ``<path>.lora_a`` (in, r), ``<path>.lora_b`` (r, out) and DoRA's ``<path>.m`` (out); the config's
``scale`` is the factor itself, not alpha.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from mindpeft.adapter_files import check_floats, shortened
from mindpeft.convert.checkpoint import open_checkpoint
from mindpeft.errors import InputError
from mindpeft.foreign.lora import LoraUpdate
from mindpeft.tuners.targeted import check_number, check_rate

CONFIG_NAME, WEIGHTS_NAME = "adapter_config.json", "adapters.safetensors"
_DEFAULT_SCALE = 20.0
_EMBEDDINGS = ("embed_tokens", "wte", "tok_embeddings", "word_embeddings", "embedding")
_LEAVES = ("lora_a", "lora_b", "m")


def is_mlx(folder: Path, config: Mapping[str, Any]) -> bool:
    """Whether a folder with this ``adapter_config.json`` is mlx-lm's."""
    return "peft_type" not in config and ("fine_tune_type" in config or (folder / WEIGHTS_NAME).is_file())


def read_mlx(folder: Path, config: Mapping[str, Any]) -> tuple[dict[str, LoraUpdate], float]:
    """Read an adapter.

    Returns:
        path -> update, and the dropout rate.

    Raises:
        InputError: it is no LoRA or DoRA, a file is missing or damaged, or a tensor can't be placed.
    """
    kind = config.get("fine_tune_type", "lora")
    if kind not in ("lora", "dora"):
        raise InputError(f"{folder} has fine_tune_type {kind!r}: only lora and dora are adapters")
    parameters = config.get("lora_parameters") or {}
    if not isinstance(parameters, Mapping):
        raise InputError(f"{folder / CONFIG_NAME}: lora_parameters must be an object")
    scaling = parameters.get("scale", _DEFAULT_SCALE)
    check_number(f"{folder / CONFIG_NAME}: lora_parameters.scale", scaling)
    dropout = parameters.get("dropout", 0.0)
    check_rate(f"{folder / CONFIG_NAME}: lora_parameters.dropout", dropout)
    if not (folder / WEIGHTS_NAME).is_file():
        raise InputError(f"{folder} holds no {WEIGHTS_NAME}")
    found: dict[str, dict[str, np.ndarray]] = {}
    with open_checkpoint(folder / WEIGHTS_NAME) as tensors:
        odd = [name for name in tensors if not name.endswith(tuple(f".{leaf}" for leaf in _LEAVES))]
        if odd:
            raise InputError(f"{folder / WEIGHTS_NAME}: {shortened(odd)} are no tensors of LoRA")
        check_floats(tensors, tensors)
        for name in tensors:
            path, _, leaf = name.rpartition(".")
            found.setdefault(path, {})[leaf] = tensors[name].numpy()
    updates = {path: _update(path, leaves, scaling) for path, leaves in found.items()}
    return updates, float(dropout)


def _update(path: str, leaves: Mapping[str, np.ndarray], scaling: float) -> LoraUpdate:
    if "lora_a" not in leaves or "lora_b" not in leaves:
        raise InputError(f"{path!r} has only {', '.join(leaves)}; lora_a and lora_b belong together")
    a, b, magnitude = leaves["lora_a"], leaves["lora_b"], leaves.get("m")
    if a.ndim != 2 or b.ndim != 2 or a.shape[1] != b.shape[0]:
        raise InputError(
            f"{path!r} has lora_a {a.shape} and lora_b {b.shape}: only (in, r) and (r, out) have an equal in "
            "PEFT (the experts of a mixture have not)"
        )
    if not a.size or not b.size:
        raise InputError(f"{path!r} has lora_a {a.shape} and lora_b {b.shape}: the rank must be 1 or more")
    if magnitude is not None and magnitude.shape != b.shape[1:]:
        raise InputError(f"{path!r} has m {magnitude.shape}, but lora_b {b.shape} wants {b.shape[1:]}")
    embedding = path.rpartition(".")[2] in _EMBEDDINGS
    return LoraUpdate(a.T, b.T, scaling, magnitude, embedding)
