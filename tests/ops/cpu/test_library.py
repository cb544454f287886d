"""Which build is found, and what is said where there is none."""

from __future__ import annotations

import ctypes
import logging
import os
import shutil
import subprocess
import sys
from pathlib import Path

import mindspore as ms
import numpy as np
import pytest
from mindspore import Tensor

from mindpeft.ops.cpu import library as module
from mindpeft.ops.cpu.attention import AttentionKernel
from mindpeft.ops.cpu.columns import ScaleColumnsKernel
from mindpeft.ops.cpu.library import LEVELS, Library, rows_of
from mindpeft.ops.cpu.linear import LinearKernel, LoraKernel
from mindpeft.ops.cpu.loss import ProjectedLossKernel
from mindpeft.ops.cpu.norms import (
    LayerNormKernel,
    LayerNormOfSumKernel,
    RmsNormKernel,
    RmsNormOfSumKernel,
)
from tests.ops.cpu.native import SILENCE

search = module.library.__wrapped__  # what is found is kept for a process
BUILT = Path(module.library().path or "")
ALL_FEATURES = {name: True for needed in LEVELS.values() for name in needed}


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """A place of no builds, in which they are looked for, on a processor that has everything."""
    monkeypatch.setattr(module, "__file__", str(tmp_path / "library.py"))
    monkeypatch.setattr(module, "_processor_features", lambda: ALL_FEATURES)
    return tmp_path


def test_the_build_in_use():
    found = module.library()
    assert found.level in LEVELS
    assert found.path.endswith(f"kernels_{found.level}.so")
    assert found.describe().startswith(f"mindpeft's kernels for {found.level}, ")
    assert found.bfloat16 or not found.matrix_units
    loaded = ctypes.CDLL(found.path)
    assert found.matrix_units == bool(loaded.has_matrix_units())
    assert found.int8 == bool(loaded.has_fast_int8_products())


@pytest.mark.parametrize(
    ("wanted", "threads"),
    [
        ({}, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()),
        ({"OMP_NUM_THREADS": "3"}, 3),
        ({"OMP_NUM_THREADS": "3", "MINDPEFT_NUM_THREADS": "5"}, 5),
        ({"OMP_NUM_THREADS": "3", "MINDPEFT_NUM_THREADS": "many"}, 3),
    ],
)
def test_as_many_threads_as_the_environment_says(wanted, threads):
    """Or all cores: that MindSpore sets OMP_NUM_THREADS to 1 in C must not count."""
    code = (
        "import ctypes\n"
        "import mindspore\n"
        "from mindpeft.ops.cpu.library import library\n"
        "print('threads', ctypes.CDLL(library().path).threads_in_use())\n"
    )
    others = {name: value for name, value in os.environ.items() if name not in module.THREADS}
    done = subprocess.run(
        [sys.executable, "-c", code], env={**others, **wanted}, capture_output=True, text=True, check=True
    )
    assert f"threads {threads}" in done.stdout


@pytest.mark.parametrize(
    ("abilities", "words"),
    [
        ({}, "plain products of float32"),
        ({"products": True}, "oneDNN's products of float32"),
        ({"products": True, "int8": True}, "oneDNN's products of float32, int8"),
        ({"products": True, "bfloat16": True}, "oneDNN's products of float32, bfloat16"),
        (
            {"products": True, "bfloat16": True, "matrix_units": True, "int8": True},
            "oneDNN's products of float32, bfloat16 (AMX), int8",
        ),
    ],
)
def test_what_is_said_of_a_build(abilities, words):
    assert Library("here", "avx2", **abilities).describe() == f"mindpeft's kernels for avx2, {words}"


def test_none_were_built(folder, caplog):
    with caplog.at_level(logging.WARNING):
        found = search()
    assert found.path is None
    assert "none were built" in found.reason
    assert found.describe() == f"MindSpore's own operators ({found.reason})"
    assert "CPU kernels are not in use: none were built" in caplog.text


def test_a_build_that_cannot_be_loaded_is_passed_over(folder):
    (folder / "kernels_avx512.so").write_bytes(b"no library at all")
    assert "kernels_avx512.so can't be loaded" in search().reason
    shutil.copy(BUILT, folder / "kernels_plain.so")
    assert search().level == "plain"


def test_a_build_is_for_processors_that_have_its_units(folder, monkeypatch):
    for level in LEVELS:
        shutil.copy(BUILT, folder / f"kernels_{level}.so")
    for level, missing in (("avx2", "AVX512BW"), ("plain", "FMA3")):
        features = {**ALL_FEATURES, "AVX512F": level != "plain", missing: False}
        monkeypatch.setattr(module, "_processor_features", lambda features=features: features)
        assert search().level == level


def test_the_build_for_avx2_has_no_instruction_of_avx512():
    """All builds are compiled of the same files, side by side: none may get what was compiled for another."""
    build, tool = BUILT.with_name("kernels_avx2.so"), shutil.which("objdump")
    if tool is None or not build.is_file():
        pytest.skip("objdump or the build for AVX2 is absent here")
    code = subprocess.run([tool, "-d", str(build)], capture_output=True, text=True, check=True).stdout
    assert "%ymm" in code
    assert "%zmm" not in code


def test_the_switch(monkeypatch, caplog):
    monkeypatch.setenv(module.SWITCH, "0")
    assert search() == Library(None, reason="MINDPEFT_CPU_KERNELS=0")
    assert "CPU kernels are not in use: MINDPEFT_CPU_KERNELS=0" in caplog.text


def zeros(*shape: int) -> Tensor:
    return Tensor(np.zeros(shape, np.float32))


MISFITS = {
    "linear": (LinearKernel, lambda cell: cell(zeros(2, 5), zeros(4, 3))),
    "lora's a": (
        LoraKernel,
        lambda cell: cell(zeros(2, 5), zeros(4, 5), zeros(1, 3), zeros(4, 1), zeros(1), Tensor(SILENCE)),
    ),
    "layer norm": (lambda: LayerNormKernel(1e-5), lambda cell: cell(zeros(2, 5), zeros(4), zeros(4))),
    "rms norm": (lambda: RmsNormKernel(1e-5), lambda cell: cell(zeros(2, 5), zeros(4))),
    "a sum": (
        lambda: RmsNormOfSumKernel(1e-5, with_sum=True),
        lambda cell: cell(zeros(2, 5), zeros(1, 5), zeros(5)),
    ),
    "layer norm of a sum": (
        lambda: LayerNormOfSumKernel(1e-5, with_sum=False),
        lambda cell: cell(zeros(2, 5), zeros(2, 5), zeros(4), zeros(4)),
    ),
    "columns": (ScaleColumnsKernel, lambda cell: cell(zeros(2, 5), zeros(4))),
    "loss": (ProjectedLossKernel, lambda cell: cell(zeros(2, 5), zeros(9, 4), zeros(2).astype(ms.int32))),
    "attention's sizes": (
        lambda: AttentionKernel(1.0, 0.0),
        lambda cell: cell(zeros(1, 2, 3, 4), zeros(1, 2, 3, 5), zeros(1, 2, 3, 4), Tensor(SILENCE)),
    ),
    "attention's heads": (
        lambda: AttentionKernel(1.0, 0.0),
        lambda cell: cell(zeros(1, 3, 3, 4), zeros(1, 2, 3, 4), zeros(1, 2, 3, 4), Tensor(SILENCE)),
    ),
}


@pytest.mark.parametrize("name", MISFITS)
def test_shapes_that_do_not_fit_are_refused(name):
    make, call = MISFITS[name]
    with pytest.raises(ValueError, match="fit"):
        call(make())


def test_rows():
    assert [rows_of(shape) for shape in ([5], [2, 3, 5], [0, 5])] == [1, 6, 0]


@pytest.mark.slow
def test_models_run_without_kernels():
    """The operators' own tests, in a process that has none."""
    root = Path(__file__).resolve().parents[3]
    command = [sys.executable, "-m", "pytest", "-q", "tests/ops", f"--ignore={Path(__file__).parent}"]
    environment = {**os.environ, module.SWITCH: "0"}
    subprocess.run(command, check=True, cwd=root, env=environment, timeout=600)
