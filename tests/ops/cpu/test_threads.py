"""The same numbers from every build, with and without oneDNN, on any number of threads."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import mindspore as ms
import pytest

from mindpeft.ops.cpu.library import library
from tests.ops.cpu import sweep
from tests.ops.cpu.expected import error, expectation

ROOT = Path(__file__).resolve().parents[3]
PRODUCTS = next((Path(ms.__file__).parent / "lib").glob("libdnnl.so.[23]"), None)
COUNT = 3
# (build, with oneDNN, threads); the build is the one in use where it has no name
RUNS = [("", True, count) for count in (1, 3, 64)] + [
    pytest.param("", True, 2, marks=pytest.mark.slow),
    pytest.param("", True, 8, marks=pytest.mark.slow),
    ("", False, 3),
    ("avx2", True, 2),
    ("avx2", False, 2),
]


@pytest.fixture(scope="module")
def expected() -> sweep.Results:
    return [expectation(case) for case in sweep.cases(COUNT)]


@pytest.mark.parametrize(("build", "products", "threads"), RUNS)
def test_equals_torch(tmp_path, expected, build, products, threads):
    path = Path(library().path)
    path = path.with_name(f"kernels_{build}.so") if build else path
    if not path.is_file() or (products and PRODUCTS is None):
        pytest.skip(f"{path.name} or oneDNN is absent here")
    out = tmp_path / "results.npz"
    command = [
        sys.executable,
        "-m",
        "tests.ops.cpu.sweep",
        str(path),
        "--count",
        str(COUNT),
        "--out",
        str(out),
    ]
    command += ["--products", str(PRODUCTS)] if products else []
    environment = {**os.environ, "MINDPEFT_NUM_THREADS": str(threads)}
    subprocess.run(command, check=True, cwd=ROOT, env=environment, timeout=300)
    for case, found, wanted in zip(sweep.cases(COUNT), sweep.load(out), expected, strict=True):
        rounded = case.family == "loss" and case.bfloat16
        assert error(found, wanted) < (2**-7 if rounded else 1e-5), case
