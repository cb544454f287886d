"""Products of float32 on the processor's matrix units, split into bfloat16s, in processes that ask for it."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from mindpeft.ops.cpu.library import library
from tests.ops.cpu import sweep
from tests.ops.cpu.expected import error, expectation

ROOT = Path(__file__).resolve().parents[3]
COUNT = 3


def run(*command: str, threads: int = 2) -> None:
    environment = {**os.environ, "MINDPEFT_AMX": "float32", "MINDPEFT_NUM_THREADS": str(threads)}
    subprocess.run([sys.executable, *command], check=True, cwd=ROOT, env=environment, timeout=300)


@pytest.fixture
def path() -> str:
    """Of the library, if this machine has such units."""
    found = library().path
    if not ctypes.CDLL(found).has_matrix_units():
        pytest.skip("this processor has no matrix units")
    return found


@pytest.mark.parametrize("threads", [1, 6])
def test_equals_torch(path, tmp_path, threads):
    out = tmp_path / "results.npz"
    run("-m", "tests.ops.cpu.sweep", path, "--count", str(COUNT), "--out", str(out), threads=threads)
    for case, found in zip(sweep.cases(COUNT), sweep.load(out), strict=True):
        rounded = case.family == "loss" and case.bfloat16
        assert error(found, expectation(case)) < (2**-7 if rounded else 1e-5), case


PRODUCT = """
import sys
import numpy as np
from tests.ops.cpu.native import Kernels
with np.load(sys.argv[2]) as file:
    x, weight = file["x"], file["weight"]
np.save(sys.argv[3], Kernels(sys.argv[1]).one("linear", x, weight, to=(len(x), len(weight))))
"""


def product(path: str, folder: Path, x: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """``x @ weight.T`` of a process of its own."""
    np.savez(folder / "inputs.npz", x=x, weight=weight)
    run("-c", PRODUCT, path, str(folder / "inputs.npz"), str(folder / "y.npy"))
    return np.load(folder / "y.npy")


def test_every_bit_counts(path, tmp_path):
    """Numbers of 24 bits, times numbers that show each of them."""
    random = np.random.default_rng(0)
    x = random.integers(2**23, 2**24, (64, 64)).astype(np.float32)
    weight = np.eye(64, dtype=np.float32) * random.choice(np.float32([1, -2, 0.5]), 64)
    np.testing.assert_array_equal(product(path, tmp_path, x, weight), x @ weight.T)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 3.4e38, 1e-40])
def test_odd_numbers_stay_in_their_rows(path, tmp_path, value):
    random = np.random.default_rng(1)
    x, weight = (random.normal(size=(100, 90)).astype(np.float32) for _ in range(2))
    x[3, 50] = value
    weight[7, 60] = value
    with np.errstate(all="ignore"):
        expected = (x.astype(np.float64) @ weight.T.astype(np.float64)).astype(np.float32)
    found = product(path, tmp_path, x, weight)
    np.testing.assert_array_equal(np.isnan(found), np.isnan(expected))
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5 * 20)
