from __future__ import annotations

import mindspore as ms
import pytest


@pytest.fixture(autouse=True)
def graph_mode():
    """Each test starts in graph mode, whatever ran before it."""
    ms.set_context(mode=ms.GRAPH_MODE)
