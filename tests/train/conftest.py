from __future__ import annotations

import pytest


@pytest.fixture(autouse=True)
def _in_graphs(graph_mode):
    """Each test starts in graph mode."""
