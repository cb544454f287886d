"""What only the compiler needed goes back to the system before a compiled Cell runs."""

from __future__ import annotations

import pytest
from mindspore import Tensor, nn

from mindpeft import compiling
from mindpeft.compiling import CompiledCell


class Twice(CompiledCell):
    def construct(self, x):
        return x * 2.0


@pytest.fixture
def released(monkeypatch, graph_mode) -> list[str]:
    calls: list[str] = []
    monkeypatch.setattr(compiling, "release_freed_memory", lambda: calls.append("released"))
    return calls


def test_once_for_every_graph(released):
    cell: nn.Cell = Twice()
    for value in ([1.0], [2.0], [1.0, 2.0], [3.0, 4.0], [5.0]):
        assert cell(Tensor(value)).asnumpy().tolist() == [2 * number for number in value]
    assert released == ["released"] * 2
