"""Attention and its parts: the CPU's compositions, the plain ones and torch agree, gradients too."""

from __future__ import annotations

import mindspore as ms
import mindspore.nn as nn
import numpy as np
import pytest
import torch
from mindspore import Tensor

from mindpeft.ops.attention import (
    AdditiveMask,
    Attention,
    CpuSoftmax,
    MergeHeads,
    SplitHeads,
    with_past,
)
from mindpeft.ops.causal_mask import AlibiMask, CausalMask
from tests.ops.compare import assert_close, run, run_torch


def random(*shape, scale=1.0, dtype=np.float32):
    return np.random.default_rng(2).normal(0, scale, shape).astype(dtype)


@pytest.mark.parametrize("shape", [(3, 1), (3, 7), (2, 3, 5, 13)])
@pytest.mark.parametrize("scale", [1.0, 50.0])
def test_softmax(shape, scale):
    x = random(*shape, scale=scale)
    found = run(CpuSoftmax(), x)
    assert_close(found, run_torch(lambda t: torch.softmax(t, -1), x), 1e-6)
    if shape[-1] > 1:
        # Once it has seen width 1, MindSpore's own gradient (2.10, PyNative) is wrong for every other width.
        assert_close(found, run(nn.Softmax(-1), x), 1e-6)


def test_softmax_of_masked_and_huge_scores():
    x = random(4, 9)
    x[0] = np.finfo(np.float32).min  # nothing visible: even weights
    x[1, 3:] = np.finfo(np.float32).min
    x[2] += 1e4
    assert_close(run(CpuSoftmax(), x), run_torch(lambda t: torch.softmax(t, -1), x), 1e-6)


def test_softmax_in_float16():
    x = random(3, 7, dtype=np.float16)
    assert_close(run(CpuSoftmax(), x), run_torch(lambda t: torch.softmax(t, -1), x), 2e-3)


@pytest.mark.parametrize(
    ("batch", "length", "heads", "size"), [(1, 1, 1, 1), (2, 7, 3, 5), (3, 4, 1, 8), (1, 5, 12, 2)]
)
@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_split_and_merge_are_exact(batch, length, heads, size, dtype):
    x = random(batch, length, heads * size, dtype=dtype)

    def split(t):
        return t.reshape(batch, length, heads, size).transpose(1, 2)

    for by_kernel, by_head in ((True, False), (False, True), (False, False)):
        splitter, merger = SplitHeads(heads), MergeHeads(heads)
        if not by_kernel:
            splitter.kernel = merger.kernel = None
        splitter.copy_by_head = merger.copy_by_head = by_head
        np.testing.assert_array_equal(splitter(Tensor(x)).asnumpy(), split(torch.tensor(x)).numpy())
        np.testing.assert_array_equal(merger(splitter(Tensor(x))).asnumpy(), x)
        if dtype == np.float32:
            assert_close(run(splitter, x), run_torch(split, x), 1e-7)
            y = random(batch, heads, length, size)
            assert_close(run(merger, y), run_torch(lambda t: t.transpose(1, 2).flatten(2), y), 1e-7)


@pytest.mark.parametrize(("queries", "keys"), [(7, 7), (1, 9), (5, 3)])
def test_attention_equals_torch(queries, keys):
    query, key, value = (
        random(2, 3, queries, 5),
        random(2, 3, keys, 5)[..., ::-1].copy(),
        random(2, 3, keys, 5),
    )
    mask = np.where(random(2, 3, queries, keys) > -0.3, 0, -1e9).astype(np.float32)
    mask[..., 0] = 0
    theirs = torch.nn.functional.scaled_dot_product_attention
    attention = Attention(3, 5)

    def merged(*arguments, **options):
        return theirs(*arguments, **options).transpose(1, 2).flatten(2)

    # the mask's own gradient is no part of the contract
    def ours(q, k, v):
        return attention(q, k, v, Tensor(mask))

    found = run(ours, query, key, value)
    wanted = torch.tensor(mask, dtype=torch.float64)
    assert_close(found, run_torch(lambda q, k, v: merged(q, k, v, attn_mask=wanted), query, key, value), 2e-6)
    assert_close(run(attention, query, key, value), run_torch(merged, query, key, value), 2e-6)


ZERO_ONE = (np.random.default_rng(1).random((2, 5, 5)) < 0.5).astype(np.int32)
MASKS = {
    "rows": ZERO_ONE[:, 0],
    "pairs": ZERO_ONE,
    "one_for_all_heads": ZERO_ONE[:, None],
    "one_query_row": ZERO_ONE[:, None, :1],
    "each_head": np.stack([ZERO_ONE, 1 - ZERO_ONE, ZERO_ONE], 1),
}


@pytest.mark.parametrize("name", MASKS)
@pytest.mark.parametrize("kind", [np.int32, np.int64, bool, np.float32])
@pytest.mark.parametrize("dtype", [ms.float32, ms.float16])
def test_additive_mask(name, kind, dtype):
    mask = MASKS[name]
    if mask.ndim == 4 and kind == np.float32:  # four axes of floats are added as they are
        expected = mask.astype(np.float32)
    else:
        expected = np.where(
            mask.astype(bool), 0.0, -32752 if dtype == ms.float16 else np.finfo(np.float32).min
        )
    expected = {2: lambda m: m[:, None, None], 3: lambda m: m[:, None], 4: lambda m: m}[mask.ndim](expected)
    for expand in (True, False):
        cell = AdditiveMask(3)
        cell.expand, cell.rules = expand, None
        found = cell(Tensor(mask.astype(kind)), 5, dtype)
        assert found.dtype == dtype
        found = found.astype(ms.float32).asnumpy()
        assert np.isfinite(found).all()
        shape = (2, 3, 5, 5) if expand else expected.shape
        assert found.shape == shape
        np.testing.assert_allclose(found, np.broadcast_to(expected, shape), rtol=5e-3)


def test_a_described_mask_hides_the_same():
    mask, attention = np.array([[1, 1, 0, 1, 0]] * 2, np.int32), Attention(3, 5)
    query, plain = random(2, 3, 5, 5), AdditiveMask(3)
    plain.rules = None

    def ours(cell):
        return lambda q, k, v: attention(q, k, v, cell(Tensor(mask), 5, ms.float32))

    found, wanted = (run(ours(cell), query, query, query) for cell in (AdditiveMask(3), plain))
    assert_close(found, wanted, 1e-6)


@pytest.mark.parametrize("kind", [CausalMask, AlibiMask])
def test_a_past_is_seen_by_all(kind):
    """Keys in front of those of the mask, as those of a prefix."""
    mask, attention = np.array([[0, 1, 1, 2, 2]] * 2, np.int32), Attention(3, 5)
    query, key, plain = random(2, 3, 5, 5), random(2, 3, 9, 5), kind(3)
    plain.rules = None

    def ours(cell):
        return lambda q, k, v: attention(q, k, v, with_past(cell(Tensor(mask), (2, 5), ms.float32), 4))

    found, wanted = (run(ours(cell), query, key, key) for cell in (kind(3), plain))
    assert_close(found, wanted, 1e-6)


def attend_to_nothing(query, key):
    """Ours, where the first text of the batch sees nothing."""
    attention, mask_cell = Attention(2, 3), AdditiveMask(2)
    visible = Tensor(np.array([[0, 0, 0, 0], [1, 1, 0, 0]], np.int32))

    def ours(q, k, v):
        return attention(q, k, v, mask_cell(visible, 4, q.dtype))

    return run(ours, query, key, query)


def test_rows_that_see_nothing_attend_evenly():
    query = random(2, 2, 4, 3, scale=5)
    found = attend_to_nothing(query, query)
    assert all(np.isfinite(array).all() for array in found)
    evenly = np.tile(query[0].mean(1).reshape((1, 6)), (4, 1))
    np.testing.assert_allclose(found[0][0], evenly, atol=1e-6)


@pytest.mark.parametrize("sign", [1, -1])
def test_rows_that_see_nothing_stay_finite_in_float16(sign):
    query = np.abs(random(2, 2, 4, 3, scale=9)).astype(np.float16)
    found = attend_to_nothing(query, sign * query)  # scores of some +-100
    assert all(np.isfinite(array).all() for array in found)
