"""What is free in the heap goes back to the system."""

from __future__ import annotations

import pytest

from mindpeft import memory
from mindpeft.memory import release_freed_memory


def resident() -> float:
    """Bytes of this process in memory that no file backs."""
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith("RssAnon")) * 1024


@pytest.mark.skipif(memory._glibc() is None, reason="not glibc")
def test_free_pages_are_given_back():
    blocks = [bytearray(50_000) for _ in range(2000)]
    kept = blocks[::100]
    del blocks
    before = resident()
    release_freed_memory()
    assert before - resident() > 50e6
    assert len(kept) == 20


def test_without_glibc_nothing_happens(monkeypatch):
    monkeypatch.setattr(memory, "_glibc", lambda: None)
    release_freed_memory()
