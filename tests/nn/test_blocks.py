"""The building blocks against torch's: names, layout, values, gradients."""

from __future__ import annotations

import mindspore as ms
import numpy as np
import pytest
import torch
from mindspore import Tensor, nn

from mindpeft.nn import Embedding, LayerNorm, Linear, lookup_tables

pytestmark = pytest.mark.usefixtures("mode")


def filled(ours, theirs):
    """Give both the same random parameters, which have the same names and shapes."""
    rng = np.random.default_rng(0)
    other = dict(theirs.named_parameters())
    parameters = dict(ours.parameters_and_names())
    assert {n: tuple(p.shape) for n, p in parameters.items()} == {n: tuple(p.shape) for n, p in other.items()}
    for name, parameter in parameters.items():
        value = rng.normal(size=parameter.shape).astype(np.float32)
        parameter.set_data(Tensor(value))
        other[name].data = torch.tensor(value)
    return ours, theirs


def assert_same(ours, theirs, x, atol=1e-5):
    """Same value, and same gradients of its sum of squares."""

    def total(argument):
        y = ours(argument)
        return (y * y).sum(), y

    parameters = ms.ParameterTuple(ours.get_parameters())
    (_, y), gradients = ms.value_and_grad(total, None, parameters, has_aux=True)(Tensor(x))
    expected = theirs(torch.tensor(x))
    (expected * expected).sum().backward()
    np.testing.assert_allclose(y.asnumpy(), expected.detach().numpy(), atol=atol)
    for name, gradient in zip(dict(ours.parameters_and_names()), gradients, strict=True):
        wanted = dict(theirs.named_parameters())[name].grad.numpy()
        assert np.abs(gradient.asnumpy() - wanted).max() <= 1e-5 * np.abs(wanted).max(), name


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(3,), (2, 5), (2, 1, 3)])
def test_linear(bias, shape):
    ours, theirs = filled(Linear(7, 9, bias), torch.nn.Linear(7, 9, bias))
    assert_same(ours, theirs, np.random.default_rng(1).normal(size=(*shape, 7)).astype(np.float32))


@pytest.mark.parametrize("eps", [1e-12, 1e-5])
def test_layer_norm(eps):
    ours, theirs = filled(LayerNorm(9, eps), torch.nn.LayerNorm(9, eps))
    assert_same(ours, theirs, np.random.default_rng(1).normal(size=(4, 3, 9)).astype(np.float32))


@pytest.mark.parametrize("padding_idx", [None, 0, 4])
def test_embedding_and_its_untrained_padding_row(padding_idx):
    ours, theirs = filled(Embedding(6, 5, padding_idx), torch.nn.Embedding(6, 5, padding_idx))
    ids = np.array([[0, 4, 4], [1, 0, 5]])
    assert_same(ours, theirs, ids)
    gradient = theirs.weight.grad.numpy()
    for row in {0, 4}:
        assert gradient[row].any() == (row != padding_idx)


def test_parameters_of_other_dtypes():
    for dtype in (ms.float16, ms.bfloat16):
        blocks = (Linear(3, 2, dtype=dtype), LayerNorm(3, dtype=dtype), Embedding(4, 3, dtype=dtype))
        assert {p.dtype for block in blocks for p in block.get_parameters()} == {dtype}


def test_tables_that_nothing_else_has():
    model = nn.CellList([Embedding(4, 3), Embedding(4, 3), Embedding(4, 3), Linear(3, 4), LayerNorm(3)])
    model[2].weight = model[1].weight
    assert lookup_tables(model) == {"0.weight", "1.weight", "2.weight"}
    model[3].weight = model[1].weight
    assert lookup_tables(model) == {"0.weight"}
    assert lookup_tables(Embedding(4, 3)) == {"weight"}
    assert lookup_tables(Linear(3, 4)) == set()
