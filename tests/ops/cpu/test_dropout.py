"""Dropout told by a hash: its rate, and inside other kernels the same numbers on the way back."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tests.ops.compare import run_torch
from tests.ops.cpu import native
from tests.ops.cpu.cases import MASKS, Random, numbers
from tests.ops.cpu.expected import error


def noise(p: float, seed: int = 0) -> np.ndarray:
    drawn = np.random.default_rng(seed).normal(size=2)
    return np.array([p, 1 / (1 - p), *drawn], np.float32)


def dropped(kernels, x: np.ndarray, seed: int = 0, p: float = 0.3) -> np.ndarray:
    return kernels.one("dropout", x, noise(p, seed), to=x.shape)


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_rate_and_scale(kernels, p):
    x = np.ones((300, 1001), np.float32)
    y = dropped(kernels, x, 0, p)
    assert set(np.unique(y)) == {0, np.float32(1 / (1 - p))}
    deviation = np.sqrt(p * (1 - p) / x.size)
    assert abs((y == 0).mean() - p) < 5 * deviation
    for axis in (0, 1):  # no row and no column is treated otherwise
        share = (y == 0).mean(axis)
        assert np.abs(share - p).max() < 6 * np.sqrt(p * (1 - p) / y.shape[axis])


def test_neighbours_and_seeds_know_nothing_of_each_other(kernels):
    x = np.ones(1 << 20, np.float32)
    kept = [dropped(kernels, x, seed, 0.5) > 0 for seed in range(3)]
    pairs = [
        (kept[0], kept[1]),
        (kept[1], kept[2]),
        (kept[0][:-1], kept[0][1:]),
        (kept[0][:-64], kept[0][64:]),
    ]
    for one, other in pairs:
        assert abs((one == other).mean() - 0.5) < 5 * 0.5 / np.sqrt(one.size)
    np.testing.assert_array_equal(kept[0], dropped(kernels, x, 0, 0.5) > 0)


def test_lora(kernels):
    random = Random(0)
    x, weight, a, b = (random.normal(*shape) for shape in ((21, 17), (9, 17), (3, 17), (9, 3)))
    scale, one = numbers(0.5), noise(0.3)
    # With the unit matrix for A and a scale of 1 the hidden columns are what LoRA sees of ones.
    seen = native.lora_with_dropout
    identity = (
        np.ones_like(x),
        weight,
        np.eye(17, dtype=np.float32),
        np.zeros((9, 17), np.float32),
        numbers(1),
    )
    factors = kernels.compute("lora_linear", *identity, one, to=[(21, 9), (21, 17)])[1]
    assert 0.2 < (factors == 0).mean() < 0.4
    kept = torch.tensor(factors).double()
    found = seen(kernels, one, x, weight, a, b, scale)
    expected = run_torch(lambda x, w, a, b: x @ w.T + 0.5 * (x * kept) @ a.T @ b.T, x, weight, a, b)
    assert error(found, expected) < 1e-5


@pytest.mark.parametrize("length", [1, 70])
def test_attention(kernels, length):
    random, keys = Random(1), 300
    q, k = random.normal(2, 2, length, 5), random.normal(2, 2, keys, 5)
    v = random.normal(2, 2, keys, 3)
    mask, settings = MASKS["some"](random, (2, 1, length, keys)).astype(np.float32), numbers(0.4, 0)
    # With unit values the output is the weights themselves; with queries of zeros all keys weigh alike.
    unit = np.tile(np.eye(keys, dtype=np.float32), (2, 2, 1, 1))
    even = (np.zeros_like(q), k, unit, np.zeros_like(mask), settings)
    weights = native.attention_with_dropout(kernels, noise(0.3), *even)[0]
    factors = torch.tensor(weights.reshape(2, length, 2, keys) * keys).double().transpose(1, 2)
    assert 0.2 < float((factors == 0).double().mean()) < 0.4
    hidden = torch.tensor(mask).double()

    def theirs(q, k, v):
        shares = torch.softmax(q @ k.mT * 0.4 + hidden, -1) * factors
        return (shares @ v).transpose(1, 2).flatten(2)

    found = native.attention_with_dropout(kernels, noise(0.3), q, k, v, mask, settings)
    assert error(found, run_torch(theirs, q, k, v)) < 1e-5
