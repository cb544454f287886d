"""The build in use, for tests that call its C functions."""

from __future__ import annotations

import mindspore as ms
import pytest

from mindpeft.ops.cpu import kernels_on
from mindpeft.ops.cpu.library import library
from tests.ops.cpu.native import Kernels


@pytest.fixture(autouse=True)
def mode() -> None:
    """PyNative, and nothing at all where there are no kernels."""
    if not kernels_on():
        pytest.skip(f"no kernels here: {library().describe()}")
    ms.set_context(mode=ms.PYNATIVE_MODE)


@pytest.fixture
def kernels() -> Kernels:
    return Kernels(library().path)


@pytest.fixture(params=[0, *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(1, 12))])
def seed(request) -> int:
    """Of the random cases; one by default, many in the slow run."""
    return request.param
