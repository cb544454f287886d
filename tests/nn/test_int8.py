"""The linear layer with a weight of int8, with kernels and without."""

from __future__ import annotations

import mindspore as ms
import numpy as np
import pytest
from mindspore import Tensor

from mindpeft.errors import InputError
from mindpeft.nn import Linear
from mindpeft.nn.int8 import Int8Linear, quantised
from mindpeft.ops.cpu import kernels_on
from mindpeft.ops.cpu.library import without_kernels
from tests.ops.cotangent import cotangent

pytestmark = pytest.mark.skipif(not kernels_on(), reason="no kernels here")


def make(bias: bool = True) -> Int8Linear:
    """One of random numbers, in 24, out 40."""
    source = Linear(24, 40, bias)
    if bias:
        source.bias.set_data(Tensor(cotangent((40,), 2)))
    layer = Int8Linear(source)
    layer.take(cotangent((40, 24), 1))
    return layer


def test_quantised():
    weight = cotangent((40, 24))
    weight[7] = 0
    codes, scale = quantised(weight)
    assert (codes.dtype, scale.dtype) == (np.int8, np.float32)
    assert (np.abs(codes).max(1) == np.where(np.arange(40) == 7, 0, 127)).all()
    np.testing.assert_allclose(codes * scale[:, None], weight, rtol=0, atol=scale.max() / 2 * 1.0001)
    np.testing.assert_array_equal(codes[7], 0)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_weight_that_is_not_finite(value):
    weight = cotangent((40, 24))
    weight[3, 3] = value
    with pytest.raises(InputError, match="NaN or infinity"):
        make().take(weight)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("rows", [3, 20])
def test_values(mode, rows, bias):
    layer, x = make(bias), cotangent((2, rows, 24), 3)
    expected = x @ layer.read().T + (layer.bias.asnumpy() if bias else 0)
    tolerance = 0.2 if rows > 4 else 1e-4
    np.testing.assert_allclose(layer(Tensor(x)).asnumpy(), expected, rtol=0, atol=tolerance)


def test_values_without_kernels(mode):
    layer, x = make(), cotangent((20, 24), 3)
    with without_kernels(layer):
        found = layer(Tensor(x)).asnumpy()
    np.testing.assert_allclose(found, x @ layer.read().T + layer.bias.asnumpy(), rtol=1e-4, atol=1e-4)


def test_gradients(mode):
    """Of x and the bias; weight and scale are frozen."""
    layer, x, dy = make(), cotangent((20, 24), 3), cotangent((20, 40), 4)
    assert [p.name for p in layer.trainable_params()] == ["bias"]
    weights = Tensor(dy)

    def total(x):
        return (layer(x) * weights).sum()

    dx, (dbias,) = ms.grad(total, 0, layer.trainable_params())(Tensor(x))
    np.testing.assert_allclose(dx.asnumpy(), dy @ layer.read(), rtol=0, atol=0.1)
    np.testing.assert_allclose(dbias.asnumpy(), dy.sum(0), rtol=1e-4, atol=1e-4)


def test_float_weight(pynative):
    layer = make()
    np.testing.assert_array_equal(layer.float_weight().asnumpy(), layer.read())
