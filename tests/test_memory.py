"""What the compiler freed goes back to the system before a compiled Cell runs."""

from __future__ import annotations

import mindspore as ms
import pytest
from mindspore import Tensor, nn

from mindpeft import memory
from mindpeft.memory import CompiledCell, release_freed_memory


class Twice(CompiledCell):
    def construct(self, x):
        return x * 2.0


@pytest.fixture
def released(monkeypatch) -> list[int]:
    calls: list[int] = []
    monkeypatch.setattr(memory, "release_freed_memory", lambda: calls.append(1))
    ms.set_context(mode=ms.GRAPH_MODE)
    return calls


def test_once_for_every_graph(released):
    cell: nn.Cell = Twice()
    for value in ([1.0], [2.0], [1.0, 2.0], [3.0, 4.0], [5.0]):
        assert cell(Tensor(value)).asnumpy().tolist() == [2 * number for number in value]
    assert len(released) == 2


def resident_bytes() -> int:
    with open("/proc/self/statm") as pages:
        return int(pages.read().split()[1]) * 4096


@pytest.mark.skipif(memory._glibc() is None, reason="not glibc")
def test_free_pages_are_given_back():
    blocks = [bytearray(50_000) for _ in range(2000)]
    kept = blocks[::100]
    del blocks
    before = resident_bytes()
    release_freed_memory()
    assert before - resident_bytes() > 50e6
    assert len(kept) == 20


def test_without_glibc_nothing_happens(monkeypatch):
    monkeypatch.setattr(memory, "_glibc", lambda: None)
    release_freed_memory()
