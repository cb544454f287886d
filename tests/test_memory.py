"""What only the compiler needed goes back to the system before a compiled Cell runs."""

from __future__ import annotations

import pytest
from mindspore import Tensor, nn

from mindpeft import memory
from mindpeft.memory import CompiledCell, release_code, release_freed_memory


class Twice(CompiledCell):
    def construct(self, x):
        return x * 2.0


@pytest.fixture
def released(monkeypatch, graph_mode) -> list[str]:
    calls: list[str] = []
    for name in ("release_freed_memory", "release_code"):
        monkeypatch.setattr(memory, name, lambda name=name: calls.append(name))
    return calls


def test_once_for_every_graph(released):
    cell: nn.Cell = Twice()
    for value in ([1.0], [2.0], [1.0, 2.0], [3.0, 4.0], [5.0]):
        assert cell(Tensor(value)).asnumpy().tolist() == [2 * number for number in value]
    assert released == ["release_freed_memory", "release_code"] * 2


def resident(kind: str) -> float:
    """Bytes of this process, of a line of its status."""
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith(kind)) * 1024


needs_glibc = pytest.mark.skipif(memory._glibc() is None, reason="not glibc")


@needs_glibc
def test_free_pages_are_given_back():
    blocks = [bytearray(50_000) for _ in range(2000)]
    kept = blocks[::100]
    del blocks
    before = resident("RssAnon")
    release_freed_memory()
    assert before - resident("RssAnon") > 50e6
    assert len(kept) == 20


@needs_glibc
def test_code_comes_back_when_it_is_called(graph_mode):
    assert Twice()(Tensor([1.0])).asnumpy().tolist() == [2.0]
    release_code()
    before = resident("RssFile")
    assert Twice()(Tensor([1.0, 3.0])).asnumpy().tolist() == [2.0, 6.0]
    release_code()
    assert resident("RssFile") < before + 50e6


def test_only_parts_that_nobody_wrote_to():
    lines = """\
7f00-7f10 r-xp 00000000 fe:00 12 /lib/libone.so.3
Anonymous:             0 kB
7f10-7f20 r--p 00000000 fe:00 12 /lib/libone.so.3
Anonymous:             4 kB
7f20-7f30 rw-p 00000000 fe:00 12 /lib/libone.so.3
Anonymous:             0 kB
7f30-7f40 r--s 00000000 fe:00 12 /lib/libone.so.3
Anonymous:             0 kB
7f40-7f50 r--p 00000000 fe:00 13 /data/weights.safetensors
Anonymous:             0 kB
7f50-7f70 r--p 00000000 fe:00 14 /lib/two.cpython-311.so
Rss:                   8 kB
Anonymous:             0 kB
7f70-7f80 r-xp 00000000 00:00 0 [vdso]
Anonymous:             0 kB
"""
    assert list(memory._unwritten_parts(iter(lines.splitlines(keepends=True)))) == [
        (0x7F00, 0x10),
        (0x7F50, 0x20),
    ]


def test_without_glibc_nothing_happens(monkeypatch):
    monkeypatch.setattr(memory, "_glibc", lambda: None)
    release_freed_memory()
    release_code()
