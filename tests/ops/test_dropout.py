"""Dropout: its rate, its scale, its gradient, and that a seed fixes it."""

from __future__ import annotations

import mindspore as ms
import numpy as np
import pytest
from mindspore import nn, ops

from mindpeft.ops.dropout import CpuDropout, dropout, seed_dropout


class Masks(nn.Cell):
    """Two dropouts of one tensor."""

    def __init__(self, p: float):
        super().__init__()
        self.first, self.second = dropout(p), dropout(p)

    def construct(self, x):
        return self.first(x), self.second(x)


@pytest.fixture(params=[ms.GRAPH_MODE, ms.PYNATIVE_MODE], ids=["graph", "pynative"])
def mode(request):
    ms.set_context(mode=request.param)
    yield request.param
    ms.set_context(mode=ms.GRAPH_MODE)


def draws(p: float, seed: int, calls: int = 20) -> np.ndarray:
    cell = Masks(p).set_train()
    seed_dropout(cell, seed)
    ones = ops.ones((512, 1024), ms.float32)
    return np.stack([np.stack([out.asnumpy() for out in cell(ones)]) for _ in range(calls)])


@pytest.mark.parametrize("p", [0.05, 0.5, 0.9])
def test_rate_and_scale(mode, p):
    out = draws(p, seed=1, calls=2)
    assert set(np.unique(out)) == {0.0, np.float32(1 / (1 - p))}
    assert (out == 0).mean() == pytest.approx(p, abs=0.002)


def test_a_seed_fixes_every_mask_and_no_two_masks_agree(mode):
    first = draws(0.3, seed=5)
    np.testing.assert_array_equal(first, draws(0.3, seed=5))
    others = [draws(0.3, seed=6)[0, 0], first[0, 1], first[1, 0]]
    for other in others:  # another seed, another dropout, another call
        agreement = (other == first[0, 0]).mean()
        assert agreement == pytest.approx(0.3**2 + 0.7**2, abs=0.01)


def test_gradient_is_the_mask(mode):
    cell = CpuDropout(0.4).set_train()
    x = ms.Tensor(np.random.default_rng(0).normal(size=(64, 64)), ms.float32)

    def value(x):
        out = cell(x)
        return out.sum(), out

    gradient, (out,) = ms.grad(value, has_aux=True)(x)
    np.testing.assert_allclose(gradient.asnumpy(), out.asnumpy() / x.asnumpy(), rtol=1e-5)


def test_nothing_is_dropped_outside_training(mode):
    x = ops.ones((8, 8), ms.float32)
    np.testing.assert_array_equal(CpuDropout(0.5).set_train(False)(x).asnumpy(), x.asnumpy())
    np.testing.assert_array_equal(CpuDropout(0.0).set_train()(x).asnumpy(), x.asnumpy())
