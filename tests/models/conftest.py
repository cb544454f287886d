"""Both execution modes, and the default one restored after each test."""

from __future__ import annotations

import mindspore as ms
import pytest


@pytest.fixture(autouse=True)
def _pynative_after_all():
    ms.set_context(mode=ms.PYNATIVE_MODE)
    yield
    ms.set_context(mode=ms.PYNATIVE_MODE)


@pytest.fixture(params=["graph", "pynative"])
def mode(request) -> str:
    """Run the test once in each mode."""
    ms.set_context(mode=ms.GRAPH_MODE if request.param == "graph" else ms.PYNATIVE_MODE)
    return request.param
