"""Parameters that graphs have and models have not."""

from __future__ import annotations

from typing import ClassVar

import mindspore as ms
import numpy as np
import pytest
from mindspore import Tensor, nn

from mindpeft.compiling import CompiledCell
from mindpeft.hidden_parameters import HiddenParameters, hide
from mindpeft.structure import structure


class Shift(nn.Cell):
    """Adds a number that it hides."""

    HIDDEN: ClassVar[tuple[str, ...]] = ("by",)

    def __init__(self, by: float | None):
        super().__init__()
        if by is not None:
            hide(self, "by", Tensor([by], ms.float32), f"shift.by.{by}")

    def construct(self, x):
        return x * 2 + self.by


class Shifts(CompiledCell):
    def __init__(self, *numbers: float):
        super().__init__()
        self.layers = nn.CellList([Shift(number) for number in numbers])

    def construct(self, x):
        for layer in self.layers:
            x = layer(x)
        return x


def test_a_graph_has_them_and_a_model_has_not():
    model = nn.SequentialCell([Shift(1.0), Shift(2.0), Shift(None)])
    assert not list(model.get_parameters())
    with HiddenParameters() as hidden:
        hidden.show(model)
        shown = list(model.get_parameters())
        assert [(item.name, item.requires_grad) for item in shown] == [
            ("shift.by.1.0", False),
            ("shift.by.2.0", False),
        ]
    assert not list(model.get_parameters())
    assert not model.parameters_dict()


@pytest.mark.parametrize("mode", [ms.GRAPH_MODE, ms.PYNATIVE_MODE])
def test_equal_layers_have_numbers_of_their_own(mode):
    ms.set_context(mode=mode)
    model = Shifts(1.0, 10.0, 100.0)
    assert len({structure(layer) for layer in model.layers}) == 1
    for x in (0.0, 1.0):
        found = model(Tensor([x], ms.float32)).asnumpy()
        np.testing.assert_array_equal(found, np.float32([8 * x + 4 * 1 + 2 * 10 + 100]))
    assert not list(model.get_parameters())
