"""How LoRA's A and B begin: from chance, or from the weight that they adapt.

PiSSA (Meng et al. 2024, "PiSSA: Principal Singular Values and Singular Vectors Adaptation of Large Language
Models") and OLoRA (Büyükakyüz 2024, "OLoRA: Orthonormal Low-Rank Adaptation of Large Language Models") take
s B A out of the weight, so that the model begins as it was: the cell works with W - s B A while such an
adapter is active. A file holds A and B alone, so whoever reads it takes the same out of the weight again.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from mindpeft.errors import InputError, did_you_mean
from mindpeft.tuners.base import Tensors, kaiming_uniform

if TYPE_CHECKING:
    from mindpeft.tuners.lora import LoraConfig

Pair = tuple[np.ndarray, np.ndarray]  # A (r, in) and B (out, r)

_NAMES = ("gaussian", "eva", "pissa", "pissa_niter_4", "olora", "loftq", "orthogonal")
_UNSUPPORTED = {
    "corda": "it needs covariances that only PEFT's preprocessing gathers",
    "lora_ga": "it needs gradients that only PEFT's preprocessing gathers",
}
_PISSA = re.compile(r"pissa(_niter_(\d+))?")


def check_initialisation(kind: bool | str) -> None:
    """Raise ``InputError`` unless ``init_lora_weights`` may have this value."""
    if isinstance(kind, bool) or kind in ("gaussian", "orthogonal", "eva") or takes_out(kind):
        return
    reason = f": {_UNSUPPORTED[kind]}" if kind in _UNSUPPORTED else did_you_mean(kind, _NAMES)
    raise InputError(
        f"init_lora_weights={kind!r} is not supported{reason}; allowed: true, false, {', '.join(_NAMES)}"
    )


def takes_out(kind: bool | str) -> bool:
    """Whether that initialisation takes the fresh adapter out of the weight."""
    return kind in ("olora", "loftq") or (isinstance(kind, str) and _PISSA.fullmatch(kind) is not None)


def random_pair(kind: bool | str, n_in: int, n_out: int, rank: int) -> Pair:
    """A and B that know nothing of the weight, from NumPy's global generator ("eva": till there are data)."""
    if kind == "orthogonal":
        return _orthogonal(n_in, n_out, rank)
    if kind == "gaussian":
        return np.random.normal(0, 1 / rank, (rank, n_in)), np.zeros((n_out, rank))
    first = kaiming_uniform((rank, n_in))
    # PEFT's init_lora_weights=False leaves torch's own initialisation in B.
    return first, np.zeros((n_out, rank)) if kind else kaiming_uniform((n_out, rank))


def _orthogonal(n_in: int, n_out: int, rank: int) -> Pair:
    """A and B whose product is zero because they use different halves of an orthogonal basis."""
    if rank % 2:
        raise InputError(f'init_lora_weights="orthogonal" needs an even rank, not {rank}')
    basis = np.linalg.qr(np.random.standard_normal((rank, rank)))[0]
    first = np.random.standard_normal((n_in, rank // 2)) @ basis[0::2]
    second = np.random.standard_normal((rank // 2, n_out)).T @ basis[1::2]
    return first.T / 10, second / 10


def pair_of_weight(kind: str, weight: np.ndarray, rank: int, scaling: float) -> Pair:
    """A and B whose s B A is to be taken out of a weight.

    Args:
        kind: "pissa", "pissa_niter_N" or "olora".
        weight: (out, in) float32.
        rank: at most the smaller side of the weight.
        scaling: s.

    Raises:
        InputError: the rank is too large.
    """
    if rank > min(weight.shape):
        raise InputError(
            f"init_lora_weights={kind!r} needs a rank of at most {min(weight.shape)} "
            f"for a weight of shape {weight.shape}, not {rank}"
        )
    if kind == "olora":
        q, r = np.linalg.qr(weight)
        return r[:rank], q[:, :rank]
    iterations = _PISSA.fullmatch(kind)[2]
    if iterations is None:
        u, values, v = np.linalg.svd(weight, full_matrices=False)
    else:
        u, values, v = low_rank_svd(weight, rank, int(iterations))
    roots = np.sqrt(values[:rank] / np.float32(scaling))
    return roots[:, None] * v[:rank], u[:, :rank] * roots


def low_rank_svd(weight: np.ndarray, rank: int, iterations: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The largest singular values and vectors, nearly: Halko et al. 2011, algorithms 4.4 and 5.1.

    The projection is always the same one, so that reading an adapter takes out of the weight what was taken
    out when it was made.
    """
    if weight.shape[0] < weight.shape[1]:
        u, values, v = low_rank_svd(weight.T, rank, iterations)
        return v.T, values, u.T
    projection = np.random.RandomState(0).standard_normal((weight.shape[1], rank)).astype(np.float32)
    basis = np.linalg.qr(weight @ projection)[0]
    for _ in range(iterations):
        basis = np.linalg.qr(weight.T @ basis)[0]
        basis = np.linalg.qr(weight @ basis)[0]
    u, values, v = np.linalg.svd(basis.T @ weight, full_matrices=False)
    return basis @ u, values, v


def as_ordinary(
    config: LoraConfig, tensors: Mapping[str, Tensors], initial: Mapping[str, Tensors]
) -> tuple[LoraConfig, dict[str, Tensors]]:
    """An equal adapter of twice the rank that leaves the base model's weights as they are.

    W - s B0 A0 + s B A = W + s [B, -B0] [A; A0].

    Args:
        config: an adapter's.
        tensors: path -> its tensors.
        initial: path -> those it began with, of the cells whose weight they were taken out of.

    Raises:
        InputError: the adapter is DoRA's, which is no sum, or LoftQ's.
    """
    if config.init_lora_weights == "loftq":
        raise InputError(
            'an adapter with init_lora_weights="loftq" can\'t be converted: what quantisation lost has no '
            "low rank; merge it, or give its readers the same base model"
        )
    if config.use_dora:
        raise InputError(
            f"an adapter with use_dora and init_lora_weights={config.init_lora_weights!r} can't be converted"
        )
    growth = math.sqrt(2) if config.use_rslora else 2  # keeps alpha / r, or alpha / sqrt(r)
    converted = replace(
        config,
        init_lora_weights=True,
        r=2 * config.r,
        lora_alpha=growth * config.lora_alpha,
        rank_pattern={key: 2 * rank for key, rank in config.rank_pattern.items()},
        alpha_pattern={key: growth * alpha for key, alpha in config.alpha_pattern.items()},
    )
    return converted, {path: _doubled(values, initial.get(path)) for path, values in tensors.items()}


def _doubled(tensors: Tensors, initial: Tensors | None) -> Tensors:
    result = {}
    for name, value in tensors.items():
        if not name.startswith("lora_"):
            result[name] = value  # rows of trained tokens
            continue
        other = np.zeros_like(value) if initial is None else initial[name]
        is_first = "_A" in name
        result[name] = np.concatenate([value, other if is_first else -other], axis=0 if is_first else 1)
    return result
