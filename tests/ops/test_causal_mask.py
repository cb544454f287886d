"""Which tokens see which: order, windows, padding, samples in one row, a cache."""

from __future__ import annotations

import mindspore as ms
import numpy as np
import pytest
import torch
from mindspore import Tensor
from transformers.models.bloom.modeling_bloom import build_alibi_tensor

from mindpeft.compiling import forget_compiled_graphs
from mindpeft.ops.causal_mask import AlibiMask, CausalMask, alibi_slopes
from tests.ops.cpu.expected import pairs


def of_pairs(
    cell: CausalMask, attention_mask: Tensor | None, shape: tuple[int, int], first=None
) -> np.ndarray:
    """The mask of a tensor, with which its description agrees where there are kernels."""
    described = cell.rules
    cell.rules = None
    mask = cell(attention_mask, shape, ms.float32, first).asnumpy()
    if described is not None and (attention_mask is None or attention_mask.ndim == 2):
        cell.rules = described
        forget_compiled_graphs()
        rules = cell(attention_mask, shape, ms.float32, first).asnumpy()
        heads = mask.shape[1]
        np.testing.assert_array_equal(
            np.broadcast_to(pairs(rules, heads, shape[1], mask.shape[-1]).astype(np.float32), mask.shape),
            mask,
        )
    return mask


def seen(values: np.ndarray) -> np.ndarray:
    """(batch, queries, keys) of the first head; all heads alike."""
    assert (values == values[:, :1]).all()
    assert set(np.unique(values)) <= {0.0, values.min()}
    return values[:, 0] == 0


def expected(attention_mask: np.ndarray, window: int | None) -> np.ndarray:
    batch, length = attention_mask.shape
    found = np.zeros((batch, length, length), bool)
    for row in range(batch):
        for query in range(length):
            for key in range(query + 1):
                mine, other = attention_mask[row, query], attention_mask[row, key]
                near = window is None or query - key < window
                found[row, query, key] = near and other != 0 and mine in (0, other)
    return found


MASKS = {
    "padding behind": [[1, 1, 1, 1, 1, 1], [1, 1, 1, 0, 0, 0]],
    "padding before": [[1, 1, 1, 1, 1, 1], [0, 0, 1, 1, 1, 1]],
    "samples": [[1, 1, 2, 2, 2, 3], [1, 1, 1, 2, 0, 0]],
}


@pytest.mark.parametrize("window", [None, 1, 3])
@pytest.mark.parametrize("given", MASKS.values(), ids=MASKS)
def test_order_window_and_samples(given, window):
    given = np.array(given, np.int32)
    mask = of_pairs(CausalMask(2, window), Tensor(given), (2, 6))
    np.testing.assert_array_equal(seen(mask), expected(given, window))


def test_without_a_mask_and_with_one_of_three_axes():
    np.testing.assert_array_equal(
        seen(of_pairs(CausalMask(2), None, (2, 4))), np.tril(np.ones((2, 4, 4), bool))
    )
    visible = np.random.default_rng(0).integers(0, 2, (2, 4, 4)).astype(np.int32)
    mask = of_pairs(CausalMask(2), Tensor(visible), (2, 4))
    np.testing.assert_array_equal(seen(mask), np.tril(visible) == 1)
    given = np.random.default_rng(0).normal(size=(1, 1, 4, 4)).astype(np.float32)
    np.testing.assert_array_equal(CausalMask(2)(Tensor(given), (1, 4), ms.float32).asnumpy(), given)


@pytest.mark.parametrize("window", [None, 3])
def test_later_queries_are_rows_of_the_whole(window):
    """One token at a time, with a cache: the rows of the mask for all."""
    given = np.array([[1] * 6, [0, 0, 1, 1, 1, 1]], np.int32)
    whole = seen(of_pairs(CausalMask(2, window), Tensor(given), (2, 6)))
    for place in (2, 5):
        first = Tensor([place], ms.int32)
        row = seen(of_pairs(CausalMask(2, window), Tensor(given), (2, 1), first))
        np.testing.assert_array_equal(row, whole[:, place : place + 1])


@pytest.mark.parametrize("heads", [1, 4, 6, 12])
def test_alibi_is_blooms(heads):
    given = np.array([[1] * 5, [0, 0, 1, 1, 1]], np.int32)
    bias = build_alibi_tensor(torch.tensor(given), heads, torch.float32).reshape(2, heads, 1, 5).numpy()
    found = of_pairs(AlibiMask(heads), Tensor(given), (2, 5))
    plain = of_pairs(CausalMask(heads), Tensor(given), (2, 5))
    visible = np.broadcast_to(plain == 0, found.shape)
    np.testing.assert_allclose(found[visible], np.broadcast_to(bias, found.shape)[visible], rtol=1e-6)
    assert len(alibi_slopes(heads)) == heads
