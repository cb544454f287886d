"""What a value is weighed with before its gradients are taken."""

from __future__ import annotations

import numpy as np


def cotangent(shape: tuple[int, ...], seed: int = 9) -> np.ndarray:
    """Fixed random numbers that bfloat16 holds exactly, so that rounding to it changes none."""
    numbers = np.random.default_rng(seed).normal(size=shape).astype(np.float32)
    return on_bfloat16_grid(numbers)


def on_bfloat16_grid(numbers: np.ndarray) -> np.ndarray:
    """The same cut to what bfloat16 holds, still float32."""
    bits = np.asarray(numbers, np.float32, order="C").view(np.uint32)
    return np.asarray(bits & np.uint32(0xFFFF0000)).view(np.float32)
