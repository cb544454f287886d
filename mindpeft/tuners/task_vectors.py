"""Arithmetic of task vectors: several updates of the same tensor combined into one, in NumPy.

Task arithmetic: Ilharco et al. 2023. TIES (trim, elect sign, merge): Yadav et al. 2023. DARE (drop and
rescale): Yu et al. 2024.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from mindpeft.errors import InputError, did_you_mean

SIGN_METHODS = ("total", "frequency")


def keep_largest(value: np.ndarray, density: float) -> np.ndarray:
    """Keep the share ``density`` of the entries, those of the largest magnitude, and make the others zero."""
    flat = np.abs(value).reshape(-1)
    kept = np.argsort(-flat, kind="stable")[: int(density * flat.size)]
    mask = np.zeros(flat.size, bool)
    mask[kept] = True
    return np.where(mask.reshape(value.shape), value, 0)


def keep_random(value: np.ndarray, density: float) -> np.ndarray:
    """Keep each entry with probability ``density`` and scale it by 1/density (NumPy's global generator)."""
    return np.where(np.random.random(value.shape) < density, value / density, 0)


def weighted_sum(values: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """The sum over the first axis of ``values``, weighted."""
    return np.tensordot(weights, values, 1)


def elected_mean(values: np.ndarray, weights: np.ndarray, sign_method: str) -> np.ndarray:
    """The weighted sum of the entries that have the majority's sign, over their number.

    Args:
        values: (n, ...).
        weights: (n,).
        sign_method: "total" elects the sign of the sum, "frequency" that of most entries.
    """
    signs = np.sign(values)
    ballot = values if sign_method == "total" else signs
    agree = signs == np.where(ballot.sum(0) >= 0, 1, -1)
    return weighted_sum(values * agree, weights) / np.maximum(agree.sum(0), 1)


Pruner = Callable[[np.ndarray, float], np.ndarray]
# How each combination prunes its vectors, and whether it elects a sign.
_STEPS: dict[str, tuple[Pruner | None, bool]] = {
    "linear": (None, False),
    "ties": (keep_largest, True),
    "dare_linear": (keep_random, False),
    "dare_ties": (keep_random, True),
    "magnitude_prune": (keep_largest, False),
}
COMBINATIONS = tuple(_STEPS)


def combine(
    values: Sequence[np.ndarray],
    weights: Sequence[float],
    combination: str = "linear",
    density: float | None = None,
    sign_method: str = "total",
) -> np.ndarray:
    """Combine task vectors.

    Args:
        values: arrays of one shape.
        weights: one for each.
        combination: one of ``COMBINATIONS``.
        density: the share of entries that pruning keeps, in (0, 1]; all but "linear" need it.
        sign_method: for "ties" and "dare_ties", see ``elected_mean``.

    Returns:
        float32 array of that shape.

    Raises:
        InputError: an unknown combination or sign method, or a density that is missing or out of range.
    """
    check_combination(combination, density, sign_method)
    prune, elects = _STEPS[combination]
    if prune is not None and density < 1:
        values = [prune(value, density) for value in values]
    stacked, weights = np.stack(values).astype(np.float32), np.asarray(weights, np.float32)
    merged = elected_mean(stacked, weights, sign_method) if elects else weighted_sum(stacked, weights)
    return merged.astype(np.float32)


def check_combination(combination: str, density: float | None, sign_method: str) -> None:
    """Raise ``InputError`` for what ``combine`` can't be asked."""
    if combination not in _STEPS:
        raise InputError(
            f"unknown combination {combination!r}{did_you_mean(combination, _STEPS)}; "
            f"allowed: {', '.join(_STEPS)}"
        )
    prunes = _STEPS[combination][0] is not None
    if prunes and (isinstance(density, bool) or not isinstance(density, int | float) or not 0 < density <= 1):
        raise InputError(f"{combination} needs a density in (0, 1], not {density!r}")
    if sign_method not in SIGN_METHODS:
        raise InputError(
            f"majority_sign_method must be one of {', '.join(SIGN_METHODS)}, not {sign_method!r}"
        )
