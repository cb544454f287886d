"""The cache of keys and values: what is written stays where it is, rows change places."""

from __future__ import annotations

import mindspore as ms
import numpy as np
import pytest
from mindspore import Tensor

from mindpeft.nn.cache import LayerCache


def tokens(count: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(2, 3, count, 4)).astype(np.float32)


@pytest.mark.usefixtures("pynative")
def test_writing_and_reordering():
    cache = LayerCache(2, 3, 6, 4)
    first, second = tokens(3, 0), tokens(1, 1)
    keys, values = cache(Tensor(first), Tensor(-first))
    np.testing.assert_array_equal(keys.asnumpy(), first)
    np.testing.assert_array_equal(values.asnumpy(), -first)
    keys, values = cache(Tensor(second), Tensor(-second), Tensor([3], ms.int32))
    expected = np.concatenate((first, second, np.zeros((2, 3, 2, 4), np.float32)), 2)
    np.testing.assert_array_equal(keys.asnumpy(), expected)
    np.testing.assert_array_equal(values.asnumpy(), -expected)
    cache.reorder(Tensor([1, 1], ms.int32))
    swapped = cache.keys.asnumpy().reshape((2, 3, 6, 4))
    np.testing.assert_array_equal(swapped, expected[[1, 1]])
    assert not any(parameter.requires_grad for parameter in cache.get_parameters())
