"""Layers whose adapter is a delta weight: one product with the sum, where there can be one, or two beside."""

from __future__ import annotations

import mindspore as ms
import numpy as np
import pytest
from mindspore import Tensor, nn, ops

import mindpeft.tuners
from mindpeft import get_peft_model
from mindpeft.nn.linear import Linear
from mindpeft.tuners.delta import DeltaLayer
from tests.tuners.against_peft import randomise

IN, OUT, ROWS = 24, 16, 90
CONFIGS = {
    "ShiraConfig": {"r": 2, "random_seed": 3},
    "FourierFTConfig": {"n_frequency": 40},
    "WaveFTConfig": {"n_frequency": 20},  # few enough for a sparse delta
    "C3AConfig": {"block_size": 8},
    "VeraConfig": {"r": 32},
    "RandLoraConfig": {"r": 8},
    "LoHaConfig": {"r": 4},
    "MissConfig": {"r": 4, "init_weights": "bat"},
    "DiffPruningConfig": {},
}


def adapted(name: str, dtype: ms.Type = ms.float32):
    """A linear cell with a method's adapter of random values, and its layer."""
    ms.set_seed(1)
    cell, random = nn.SequentialCell(Linear(IN, OUT, dtype=dtype)), np.random.default_rng(0)
    for parameter in cell.get_parameters():
        value = Tensor(random.normal(size=parameter.shape).astype(np.float32))
        parameter.set_data(value.astype(dtype))
    config = getattr(mindpeft.tuners, name)
    model = get_peft_model(cell, config(target_modules=["0"], **CONFIGS[name]))
    randomise(model)
    model.set_train(False)
    return model, next(layer for _, layer in model.cells_and_names() if isinstance(layer, DeltaLayer))


def some_rows(count: int) -> Tensor:
    return Tensor(np.random.default_rng(2).normal(size=(count, IN)).astype(np.float32))


def value_and_gradients(model: nn.Cell, x: Tensor) -> list[np.ndarray]:
    """Of the input, and of what is trained."""
    trained = model.trainable_params()
    weights = Tensor(np.random.default_rng(4).normal(size=(len(x), OUT)).astype(np.float32))

    def total(x):
        result = model(x)
        return ops.sum(result * weights), result

    (_, result), (of_x, of_trained) = ms.value_and_grad(total, 0, trained, has_aux=True)(x)
    return [value.asnumpy() for value in (result, of_x, *of_trained)]


@pytest.mark.parametrize("mode", [ms.PYNATIVE_MODE, ms.GRAPH_MODE])
@pytest.mark.parametrize("name", CONFIGS)
def test_one_product_equals_two(name, mode):
    ms.set_context(mode=mode)
    found = []
    for beside in (False, True):
        model, layer = adapted(name)
        assert layer.is_summed(some_rows(ROWS))
        layer.is_around_linear = not beside
        found.append(value_and_gradients(model, some_rows(ROWS)))
    assert len(found[0]) > 2
    for one, two in zip(*found, strict=True):
        np.testing.assert_allclose(one, two, rtol=1e-5, atol=1e-5 * np.abs(two).max())


@pytest.mark.parametrize("rows", [3, ROWS])
@pytest.mark.parametrize("name", CONFIGS)
def test_equals_the_merged_weight(name, rows):
    ms.set_context(mode=ms.PYNATIVE_MODE)
    model, _ = adapted(name)
    before = model(some_rows(rows)).asnumpy()
    model.merge_adapter()
    np.testing.assert_allclose(before, model(some_rows(rows)).asnumpy(), rtol=1e-5, atol=1e-4)


def test_two_products_beside_bfloat16_and_around_other_layers():
    ms.set_context(mode=ms.PYNATIVE_MODE)
    _, layer = adapted("ShiraConfig", ms.bfloat16)
    assert not layer.is_summed(some_rows(ROWS))
    model, inner = adapted("ShiraConfig")
    config = mindpeft.tuners.ShiraConfig(target_modules=["0"], **CONFIGS["ShiraConfig"])
    model.add_adapter("other", config)
    model.set_adapter(["default", "other"])
    outer = next(layer for _, layer in model.cells_and_names() if isinstance(layer, DeltaLayer))
    assert outer is not inner
    assert (inner.is_summed(some_rows(ROWS)), outer.is_summed(some_rows(ROWS))) == (True, False)
