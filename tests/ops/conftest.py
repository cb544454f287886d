"""Both execution modes for the tests of operations."""

from __future__ import annotations

import mindspore as ms
import pytest


@pytest.fixture(params=["pynative", pytest.param("graph", marks=pytest.mark.slow)], autouse=True)
def mode(request) -> str:
    """Run each test in PyNative, with -m slow in a graph too: the models' tests compile these operations."""
    ms.set_context(mode=ms.GRAPH_MODE if request.param == "graph" else ms.PYNATIVE_MODE)
    yield request.param
    ms.set_context(mode=ms.PYNATIVE_MODE)
