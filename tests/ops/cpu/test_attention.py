"""Attention in blocks against torch: masks of all kinds, rows that see nothing, bad numbers."""

from __future__ import annotations

import numpy as np
import pytest
from mindspore import Tensor

from mindpeft.ops.cpu.attention import AttentionKernel, MaskedAttentionKernel
from tests.ops.cpu.cases import LOWEST, MASKS, SAMPLES, Case, Random, numbers, some
from tests.ops.cpu.cells import assert_equals_torch
from tests.ops.cpu.expected import error, expectation, pairs, worst
from tests.ops.cpu.native import SILENCE

SIZE, VALUE_SIZE = 5, 3


def case_of(length: int, keys: int, mask: np.ndarray | None = None, cap: float = 0.0) -> Case:
    """Two heads of queries for one of keys."""
    random = Random(4)
    inputs = (
        random.normal(2, 2, length, SIZE),
        random.normal(2, 1, keys, SIZE),
        random.normal(2, 1, keys, VALUE_SIZE),
    )
    settings = numbers(0.5, cap)
    if mask is None:
        return Case("attention", inputs, (settings,))
    return Case("masked_attention", inputs, (mask.astype(np.float32), settings))


def assert_as_torch(kernels, case: Case) -> None:
    assert error(case.run(kernels), expectation(case)) < 1e-5


@pytest.mark.parametrize("family", ["attention", "masked_attention", "described_attention"])
def test_equals_torch(kernels, family, seed):
    assert worst(kernels, some(family, 60, seed)) < 1e-5


@pytest.mark.parametrize("cap", [0.0, 2.0])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(("length", "keys"), [(1, 17), (7, 17), (7, 256), (7, 257)])
def test_cells(length, keys, masked, cap):
    """Up to 256 keys their backward pass does without the output."""
    mask = MASKS["some"](Random(0), (2, 1, length, keys)) if masked else None
    case = case_of(length, keys, mask, cap)
    cell = (MaskedAttentionKernel if masked else AttentionKernel)(0.5, cap)
    more = [Tensor(case.fixed[0])] if masked else []
    more.append(Tensor(SILENCE))
    assert_equals_torch(lambda *inputs: cell(*inputs, *more)[0], case)


def test_cell_of_no_text():
    case = case_of(7, 17)
    case = Case("attention", tuple(value[:0] for value in case.inputs), case.fixed)
    cell = AttentionKernel(0.5, 0.0)
    assert_equals_torch(lambda *inputs: cell(*inputs, Tensor(SILENCE))[0], case)


@pytest.mark.parametrize("cap", [1.0, 30.0, 1e3, 1e6])
@pytest.mark.parametrize("length", [1, 65])
def test_bounds_far_above_the_scores_cost_no_digits(kernels, length, cap):
    assert_as_torch(kernels, case_of(length, 300, cap=cap))


@pytest.mark.parametrize("hidden", [LOWEST, -np.inf])
@pytest.mark.parametrize("keys", [1, 7, 256, 600])
@pytest.mark.parametrize("length", [1, 7, 65])
def test_a_row_that_sees_nothing_weighs_all_keys_alike(kernels, length, keys, hidden):
    """By -inf too, where torch gives NaN; the other rows stay what they are."""
    mask = np.zeros((2, 1, length, keys), np.float32)
    mask[0, 0, length // 2] = hidden
    case = case_of(length, keys, mask)
    out, dq, _, _ = case.run(kernels)
    evenly = np.tile(case.inputs[2][0, 0].mean(0), 2)
    np.testing.assert_allclose(out[0, length // 2], evenly, atol=2e-6)
    if keys == 600:  # the row alone: no key is seen less than another
        assert np.isfinite(dq).all()
    mask[0, 0, length // 2] = LOWEST
    expected = expectation(case_of(length, keys, mask))
    assert error(case.run(kernels), expected) < 1e-5


@pytest.mark.parametrize("length", [1, 65])
def test_a_row_hidden_twice_weighs_alike_what_is_hidden_once(kernels, length):
    """Two masks added up are -inf where both hide; the keys that one hides are hidden least."""
    mask = np.full((2, 1, length, 600), LOWEST)
    mask[:, :, :, 100:590] = -np.inf
    assert_as_torch(kernels, case_of(length, 600, mask))


@pytest.mark.parametrize("seen", [0, 255, 256, 599])
@pytest.mark.parametrize("length", [1, 7, 130])
def test_one_key_of_many_blocks_is_seen(kernels, length, seen):
    mask = np.full((1, 1, 1, 600), LOWEST)
    mask[..., seen] = 0
    case = case_of(length, 600, mask)
    assert_as_torch(kernels, case)
    assert not case.run(kernels)[1].any()  # where there is no choice, a query makes no difference


@pytest.mark.parametrize("keys", [256, 600])
def test_high_scores_cost_no_digits(kernels, keys):
    """The logarithm of a sum of exponentials of 4,096 would be rounded to 5e-4."""
    mask = Random(2).normal(2, 1, 65, keys).round() + 4096
    case = case_of(65, keys, mask)
    case.inputs[0][:] = 0  # nothing is rounded where these are added
    assert error(case.run(kernels), expectation(case)) < 3e-6


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("place", [0, 1, 2])
@pytest.mark.parametrize(("length", "keys"), [(1, 1), (1, 300), (65, 1), (65, 300)])
def test_one_bad_number_goes_where_it_goes_in_torch(kernels, length, keys, place, value):
    case = case_of(length, keys)
    if place < 2:  # infinite scores of one sign, which are not a number either
        for array in case.inputs[:2]:
            np.abs(array, out=array)
    case.inputs[place][0, 0, min(5, case.inputs[place].shape[2] - 1), 1] = value
    assert_as_torch(kernels, case)


@pytest.mark.parametrize("key", [5, 280])
@pytest.mark.parametrize("length", [1, 65])
def test_nan_in_a_mask_reaches_its_rows(kernels, length, key):
    """In a block that is hidden otherwise too."""
    mask = np.zeros((2, 1, 1, 300), np.float32)
    mask[..., :256] = LOWEST
    mask[1, ..., key] = np.nan
    assert_as_torch(kernels, case_of(length, 300, mask))


def test_a_query_that_is_not_a_number_reaches_hidden_keys(kernels):
    """As in torch: its weights are NaN for them, too."""
    mask = np.where(np.arange(600) < 20, 0, LOWEST).reshape((1, 1, 1, 600))
    case = case_of(65, 600, mask)
    case.inputs[0][0, 0, 5, 1] = np.nan
    assert_as_torch(kernels, case)


@pytest.mark.parametrize("length", [1, 65])
def test_blocks_that_nobody_sees_may_hold_anything(kernels, length):
    """A cache's unused places: nothing is computed for them, where torch would give 0 NaN."""
    mask = np.where(np.arange(600) < 20, 0, LOWEST).reshape((1, 1, 1, 600))
    case = case_of(length, 600, mask)
    expected = expectation(case)
    case.inputs[2][:, :, 256:] = np.nan
    assert error(case.run(kernels)[:1], expected[:1]) < 1e-5


@pytest.mark.parametrize("cap", [0.0, 2.0])
@pytest.mark.parametrize("length", [1, 7, 65, 257])
def test_one_key(kernels, length, cap):
    """It is all there is to see, whatever its score: queries and key get no gradient but rounding."""
    case = case_of(length, 1, cap=cap)
    out, dq, dk, dv = case.run(kernels)
    wanted, _, _, wanted_dv = expectation(case)
    assert error([out, dv], [wanted, wanted_dv]) < 1e-5
    assert max(np.abs(dq).max(), np.abs(dk).max()) < 1e-5


def test_scores_of_any_size(kernels):
    """The largest is subtracted before the exponential."""
    case = case_of(65, 300)
    case.inputs[0][:] *= 100
    out, *_ = case.run(kernels)
    assert error([out], expectation(case)[:1]) < 1e-4  # scores of 1000 are good to 1e-4


@pytest.mark.parametrize("name", ["packed", "padding", "none"])
@pytest.mark.parametrize(("causal", "window", "alibi"), [(1, 0, 0), (1, 40, 0), (1, 0, 1), (0, 0, 0)])
def test_a_described_mask_is_that_of_all_pairs(kernels, name, causal, window, alibi):
    """Blocks that lie behind a query or before its window, and those of other samples, are left out."""
    samples = SAMPLES[name](Random(3), 600)
    rules = np.array([[causal, 0, window, alibi, 0]] * (1 if samples is None else 2), np.float32)
    if samples is not None:
        rules = np.concatenate((rules, samples), 1).astype(np.float32)
    of_rules = case_of(600, 600, rules)
    of_pairs = case_of(600, 600, pairs(rules, 2, 600, 600))
    assert error(of_rules.run(kernels), of_pairs.run(kernels)) < 2e-6


def test_later_tokens_see_what_the_cache_holds(kernels):
    for case in some("cached_attention", 12):
        q, k, v = case.inputs
        mask, settings, keys, values, place = case.fixed
        out, new_keys, new_values = case.run(kernels)
        heads, room, length = k.shape[0] * k.shape[1], mask.shape[-1], k.shape[2]
        held = []
        for cache, fresh, written in ((keys, k, new_keys), (values, v, new_values)):
            expected = cache.reshape(heads, room, -1).copy()
            expected[:, place[0] : place[0] + length] = fresh.reshape(heads, length, -1)
            np.testing.assert_array_equal(written.reshape(expected.shape), expected)
            held.append(expected.reshape(*k.shape[:2], room, -1))
        seen = Case("masked_attention", (q, *held), (mask, settings))
        assert error([out], expectation(seen)[:1]) < 1e-5


def test_a_cache_with_a_described_mask(kernels):
    """The rules say where the tokens stand."""
    for case in some("cached_attention", 12):
        mask, *rest = case.fixed
        rules = np.concatenate(([1, rest[-1][0], 0, 0, 0], np.ones(mask.shape[-1])))[None].astype(np.float32)
        described = Case(case.family, case.inputs, (rules, *rest))
        assert error(described.run(kernels)[:1], case.run(kernels)[:1]) < 1e-6


@pytest.mark.parametrize("room", [7, 20])
def test_first_tokens_see_each_other_and_begin_the_cache(kernels, room):
    case = case_of(7, 7, np.where(np.tri(7) > 0, 0, LOWEST)[None, None])
    caches = [np.full((2 * room, size), 9, np.float32) for size in (SIZE, VALUE_SIZE)]
    cached = Case("cached_attention", case.inputs, (*case.fixed, *caches, None))
    out, keys, values = cached.run(kernels)
    assert error([out], expectation(case)[:1]) < 1e-5
    for written, fresh in ((keys, case.inputs[1]), (values, case.inputs[2])):
        apart = written.reshape(2, room, -1)
        np.testing.assert_array_equal(apart[:, :7], fresh[:, 0])
        assert (apart[:, 7:] == 9).all()


def test_a_full_cache_is_not_written_beyond(kernels):
    """Three tokens where one fits: the others are left out, and no other head's row is touched."""
    case = case_of(3, 3, np.zeros((1, 1, 3, 5), np.float32))
    caches = [np.full((10, size), 9, np.float32) for size in (SIZE, VALUE_SIZE)]
    fixed = (*case.fixed, *caches, np.array([4], np.int32))
    _, keys, values = Case("cached_attention", case.inputs, fixed).run(kernels)
    for written, fresh in ((keys, case.inputs[1]), (values, case.inputs[2])):
        apart = written.reshape(2, 5, -1)
        np.testing.assert_array_equal(apart[:, 4], fresh[:, 0, 0])
        assert (apart[:, :4] == 9).all()
