from __future__ import annotations

import pytest


@pytest.fixture(autouse=True)
def _without_graphs(pynative):
    """Each test starts in PyNative mode; those with ``mode`` run in a graph too."""
