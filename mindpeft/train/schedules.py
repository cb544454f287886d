"""Learning-rate schedules: each is a function from the number of finished optimizer steps to a factor."""

from __future__ import annotations

import math
from collections.abc import Callable

from mindpeft.errors import InputError, did_you_mean

Schedule = Callable[[int], float]


def _linear(progress: float) -> float:
    return 1.0 - progress


def _cosine(progress: float) -> float:
    return 0.5 * (1.0 + math.cos(math.pi * progress))


def _constant(progress: float) -> float:
    return 1.0


SHAPES: dict[str, Callable[[float], float]] = {"linear": _linear, "cosine": _cosine, "constant": _constant}


def get_schedule(name: str, warmup_steps: int, total_steps: int) -> Schedule:
    """Return the factor by which the peak learning rate is multiplied, as a function of the step.

    The factor rises linearly from 0 to 1 during ``warmup_steps`` optimizer steps, then follows the shape
    ``name`` down to 0 at ``total_steps`` (``constant`` stays at 1): the values of
    ``transformers.get_scheduler`` (its ``constant_with_warmup`` for ``constant``).

    Args:
        name: ``"linear"``, ``"cosine"`` or ``"constant"``.
        warmup_steps: optimizer steps of warm-up, 0 for none.
        total_steps: optimizer steps of the whole run.

    Raises:
        InputError: unknown ``name``.
    """
    if name not in SHAPES:
        raise InputError(
            f"unknown schedule {name!r}: choose from {', '.join(SHAPES)}{did_you_mean(name, SHAPES)}"
        )
    shape = SHAPES[name]

    def factor(step: int) -> float:
        if step < warmup_steps:
            return step / warmup_steps
        progress = (step - warmup_steps) / max(1, total_steps - warmup_steps)
        return shape(min(1.0, progress))

    return factor
