"""Salts: what tells random numbers apart, and is no parameter of a model."""

from __future__ import annotations

import numpy as np
import pytest
from mindspore import nn

from mindpeft.hidden_parameters import HiddenParameters
from mindpeft.ops.dropout import dropout, seed_dropout
from mindpeft.ops.random import SaltedCell


@pytest.fixture
def model() -> nn.Cell:
    return nn.SequentialCell([dropout(0.1), dropout(0.0), nn.SequentialCell([dropout(0.2)])])


def salts(model: nn.Cell) -> dict[str, np.ndarray]:
    cells = [cell for _, cell in model.cells_and_names() if isinstance(cell, SaltedCell)]
    return {cell.salt.name: cell.salt.asnumpy() for cell in cells if cell.normal is not None}


def test_a_graph_has_them_and_a_model_has_not(model):
    assert not list(model.get_parameters())
    with HiddenParameters() as shown:
        shown.show(model)
        names = [parameter.name for parameter in model.get_parameters()]
        assert sorted(names) == sorted(salts(model))
        assert not any(parameter.requires_grad for parameter in model.get_parameters())
    assert not list(model.get_parameters())


def test_each_has_its_own(model):
    found = salts(model)
    assert len(np.unique(np.concatenate(list(found.values())))) == 2 * len(found)


def test_a_seed_fixes_names_and_numbers(model):
    seed_dropout(model, 7)
    first = salts(model)
    seed_dropout(model, 8)
    assert all((first[name] != value).all() for name, value in salts(model).items())
    seed_dropout(model, 7)
    again = salts(model)
    assert first.keys() == again.keys()
    assert all((first[name] == value).all() for name, value in again.items())
    assert len(np.unique(np.concatenate(list(first.values())))) == 2 * len(first)
