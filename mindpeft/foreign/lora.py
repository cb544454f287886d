"""LoRA updates by themselves, whatever format they came in, and writing them as a PEFT adapter."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from mindpeft.adapter_files import write_adapter
from mindpeft.errors import InputError
from mindpeft.files import atomic_folder
from mindpeft.tuners.base import Tensors
from mindpeft.tuners.dora import MAGNITUDE
from mindpeft.tuners.lora import LoraConfig
from mindpeft.tuners.lora_layers import LoraEmbedding, LoraLinear


@dataclass(frozen=True)
class LoraUpdate:
    """What LoRA adds to one matrix: scaling * b @ a.

    Attributes:
        a: (r, in).
        b: (out, r).
        scaling: the factor.
        magnitude: (out,) of DoRA, if it is one.
        embedding: whether the matrix is an embedding's.
    """

    a: np.ndarray
    b: np.ndarray
    scaling: float
    magnitude: np.ndarray | None = None
    embedding: bool = False

    @property
    def rank(self) -> int:
        """r."""
        return self.a.shape[0]


def pair_up(a: np.ndarray, b: np.ndarray, path: str) -> tuple[np.ndarray, np.ndarray]:
    """A and B as (r, in) and (out, r), from either that or (in, r) and (r, out).

    Raises:
        InputError: they are no matrices, don't share a rank, or fit both ways.
    """
    if a.ndim != 2 or b.ndim != 2:
        shapes = f"{a.shape} and {b.shape}"
        raise InputError(f"{path!r} has LoRA tensors of shapes {shapes}, which are no matrices (experts?)")
    if not a.size or not b.size:
        raise InputError(f"{path!r} has LoRA tensors {a.shape} and {b.shape}: the rank must be 1 or more")
    as_peft, transposed = a.shape[0] == b.shape[1], a.shape[1] == b.shape[0]
    if as_peft and transposed and a.shape[0] != a.shape[1]:
        transposed = min(a.shape) == a.shape[1]
        as_peft = not transposed
    if as_peft == transposed:
        raise InputError(f"{path!r} has LoRA tensors {a.shape} and {b.shape}, whose ranks can't be told")
    return (a, b) if as_peft else (a.T, b.T)


def write_lora(
    folder: str | Path,
    updates: Mapping[str, LoraUpdate],
    *,
    task_type: str | None = None,
    base_model: str | None = None,
    dropout: float = 0.0,
) -> LoraConfig:
    """Write updates as an adapter folder of PEFT's.

    Args:
        folder: made; must be empty or absent.
        updates: the path of each matrix in the Hugging Face model -> what is added to it.
        task_type: for the config; none with a trained head, which these formats don't have.
        base_model: for the config.
        dropout: for the config.

    Returns:
        the config that was written.

    Raises:
        InputError: there is nothing to write, DoRA and LoRA are mixed, or the folder can't be written.
    """
    config, tensors = lora_adapter(updates, task_type=task_type, base_model=base_model, dropout=dropout)
    with atomic_folder(folder) as made:
        write_adapter(made, [(config, {config.CELL_PREFIX + name: v for name, v in tensors.items()})])
    return config


def lora_adapter(
    updates: Mapping[str, LoraUpdate],
    *,
    task_type: str | None = None,
    base_model: str | None = None,
    dropout: float = 0.0,
) -> tuple[LoraConfig, Tensors]:
    """The config and tensors, by their names without prefix, of an adapter of updates; see ``write_lora``."""
    if not updates:
        raise InputError("there is no LoRA tensor to convert")
    dora = {update.magnitude is not None for update in updates.values()}
    if len(dora) > 1:
        raise InputError("some matrices have DoRA's magnitudes and some have not: PEFT has no such adapter")
    rank = Counter(update.rank for update in updates.values()).most_common(1)[0][0]
    alphas = {path: update.scaling * update.rank for path, update in updates.items()}
    alpha = Counter(alphas.values()).most_common(1)[0][0]
    config = LoraConfig(
        r=rank,
        lora_alpha=_whole(alpha),
        lora_dropout=dropout,
        target_modules=sorted(updates),
        use_dora=dora.pop(),
        rank_pattern={re.escape(path): u.rank for path, u in updates.items() if u.rank != rank},
        alpha_pattern={re.escape(path): _whole(value) for path, value in alphas.items() if value != alpha},
        task_type=task_type,
        base_model_name_or_path=base_model,
    )
    tensors = {
        name: value for path, update in updates.items() for name, value in _named(path, update).items()
    }
    return config, tensors


def _named(path: str, update: LoraUpdate) -> dict[str, np.ndarray]:
    """An update's tensors by PEFT's names, without the prefix."""
    names = LoraEmbedding.NAMES if update.embedding else LoraLinear.NAMES
    tensors = dict(zip(names, (update.a, update.b), strict=True))
    if update.magnitude is not None:
        tensors[MAGNITUDE] = update.magnitude.reshape(-1)
    return {f"{path}.{name}": np.ascontiguousarray(value) for name, value in tensors.items()}


def _whole(value: float) -> float:
    """16.0 as 16, which is how configs have it."""
    return int(value) if float(value).is_integer() else value
