"""Turning pairs of columns: torch's formula, both layouts, part of a head, gradients."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from mindpeft.ops.rotary import Rotate
from tests.ops.compare import assert_close, run, run_torch


def tables(size: int, interleaved: bool) -> tuple[np.ndarray, np.ndarray]:
    """Cosines, and sines with the sign of the formula, (batch, heads, length, size)."""
    angles = np.random.default_rng(1).uniform(-3, 3, (2, 1, 5, size // 2))
    both = [
        np.repeat(part, 2, -1) if interleaved else np.concatenate((part, part), -1) for part in _of(angles)
    ]
    return tuple(np.tile(part, (1, 3, 1, 1)).astype(np.float32) for part in both)


def _of(angles):
    return np.cos(angles), np.sin(angles)


def signs(size: int, interleaved: bool) -> np.ndarray:
    half = np.ones(size, np.float32)
    half[:: 2 if interleaved else 1][: size // 2] = -1
    return half


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize(("width", "size"), [(8, 8), (8, 4), (6, 2)])
def test_equals_torch(width, size, interleaved):
    x = np.random.default_rng(0).normal(size=(2, 3, 5, width)).astype(np.float32)
    cos, sin = tables(size, interleaved)
    sin = sin * signs(size, interleaved)
    rotate = Rotate(size, interleaved)
    found = run(rotate, x, cos, sin)[:2]

    def plain(value, cos, sin):
        turned, rest = value[..., :size], value[..., size:]
        if interleaved:
            exchanged = turned.unflatten(-1, (-1, 2)).flip(-1).flatten(-2)
        else:
            exchanged = turned.roll(size // 2, -1)
        return torch.cat((turned * cos + exchanged * sin, rest), -1)

    assert_close(found, run_torch(plain, x, cos, sin)[:2], 1e-6)
