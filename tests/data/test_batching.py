"""Batches have fixed shapes, hold each row once, and are the same for the same seed and epoch."""

from __future__ import annotations

import random

import numpy as np
import pytest

from mindpeft.data.batching import BucketBatcher
from mindpeft.errors import InputError


def make(count=103, longest=60, labels="int"):
    rng = random.Random(count)
    rows = []
    for number in range(count):
        length = rng.randint(1, longest)
        row = {
            "input_ids": [number + 1] * length,
            "token_type_ids": [1] * length,
            "attention_mask": [1] * length,
        }
        row["labels"] = {"int": number % 5, "float": number / 7, "vector": [1.0, number * 0.5]}.get(
            labels, [number % 3] * length
        )
        rows.append(row)
    return rows


def same(first, second):
    first, second = list(first), list(second)
    assert len(first) == len(second)
    for a, b in zip(first, second, strict=True):
        assert a.keys() == b.keys()
        for name in a:
            np.testing.assert_array_equal(a[name], b[name])


@pytest.mark.parametrize("shuffle", [False, True])
@pytest.mark.parametrize("labels", ["int", "float", "vector", "tokens"])
def test_every_row_once_and_unchanged(labels, shuffle):
    rows = make(labels=labels)
    batcher = BucketBatcher(rows, 8, pad_token_id=9999, shuffle=shuffle, seed=3)
    seen = []
    for batch in batcher:
        length = batch["input_ids"].shape[1]
        assert batch["input_ids"].shape == (8, length)
        assert (8, length) in batcher.shapes
        for name in ("input_ids", "token_type_ids", "attention_mask", "index"):
            assert batch[name].dtype == np.int32
        assert batch["example_mask"].dtype == np.float32
        for at, index in enumerate(batch["index"]):
            if index < 0:
                continue
            seen.append(int(index))
            row, real = rows[index], len(rows[index]["input_ids"])
            assert batch["example_mask"][at] == 1
            assert batch["input_ids"][at].tolist() == row["input_ids"] + [9999] * (length - real)
            assert batch["attention_mask"][at].tolist() == [1] * real + [0] * (length - real)
            assert batch["token_type_ids"][at].tolist() == [1] * real + [0] * (length - real)
            expected = row["labels"] + [-100] * (length - real) if labels == "tokens" else row["labels"]
            np.testing.assert_allclose(batch["labels"][at], expected, rtol=1e-6)
    assert sorted(seen) == list(range(len(rows)))
    assert len(batcher) == 13 == len(list(batcher))


@pytest.mark.parametrize(
    ("labels", "dtype", "fill"),
    [
        ("int", np.int32, -100),
        ("float", np.float32, 0),
        ("vector", np.float32, 0),
        ("tokens", np.int32, -100),
    ],
)
def test_padding_rows(labels, dtype, fill):
    last = list(BucketBatcher(make(9, labels=labels), 8, pad_token_id=7))[-1]
    assert last["example_mask"].tolist() == [1] + [0] * 7
    assert last["index"][1:].tolist() == [-1] * 7
    assert (last["input_ids"][1:] == 7).all()
    assert last["attention_mask"][1:].sum() == 7
    assert (last["attention_mask"][:, 0] == 1).all()
    assert last["labels"].dtype == dtype
    assert (last["labels"][1:] == fill).all()


def test_shapes_and_padding_share_are_true():
    batcher = BucketBatcher(make(500, 200), 16, shuffle=True)
    batches = list(batcher)
    counted = {}
    for batch in batches:
        shape = batch["input_ids"].shape
        counted[shape] = counted.get(shape, 0) + 1
    assert counted == batcher.shapes
    assert len(counted) <= 4
    real = sum(int(batch["attention_mask"][batch["example_mask"] == 1].sum()) for batch in batches)
    assert batcher.padding_share == pytest.approx(
        1 - real / sum(batch["input_ids"].size for batch in batches)
    )
    one = BucketBatcher(make(500, 200), 16, max_buckets=1)
    assert batcher.padding_share < 0.7 * one.padding_share


def test_order_is_fixed_by_seed_and_epoch():
    def orders(seed, epoch):
        batcher = BucketBatcher(make(), 8, shuffle=True, seed=seed)
        batcher.set_epoch(epoch)
        return [batch["index"].tolist() for batch in batcher]

    assert orders(1, 0) == orders(1, 0)
    assert orders(1, 0) != orders(1, 1)
    assert orders(1, 0) != orders(2, 0)


def test_shuffling_mixes_buckets_and_rows():
    batcher = BucketBatcher(make(400), 8, shuffle=True, seed=0)
    widths = [batch["input_ids"].shape[1] for batch in batcher]
    assert widths != sorted(widths)
    np.random.seed(0)
    expected = np.random.rand()
    np.random.seed(0)
    list(batcher)
    assert np.random.rand() == expected  # the global generator is not touched


def test_without_shuffle_rows_keep_their_order_in_a_bucket():
    for batch in BucketBatcher(make(), 8, buckets=[64]):
        rows = batch["index"][batch["index"] >= 0].tolist()
        assert rows == list(range(rows[0], rows[0] + len(rows)))


def test_skipping_for_a_resumed_run():
    calls = []

    def transform(batch, generator):
        calls.append(1)
        return batch | {"noise": generator.random(2)}

    batcher = BucketBatcher(make(), 8, shuffle=True, seed=5, transform=transform)
    batcher.set_epoch(2)
    whole = list(batcher)
    calls.clear()
    batcher.set_epoch(2, skip_batches=9)
    same(whole[9:], batcher)
    assert len(calls) == len(whole) - 9
    batcher.set_epoch(2)
    same(whole, batcher)


def test_drop_last():
    batcher = BucketBatcher(make(), 8, drop_last=True)
    assert len(batcher) == 12 == len(list(batcher))
    assert all((batch["example_mask"] == 1).all() for batch in batcher)


def test_rows_without_labels():
    rows = [{name: row[name] for name in ("input_ids", "attention_mask")} for row in make(5)]
    (batch,) = BucketBatcher(rows, 8)
    assert set(batch) == {"input_ids", "attention_mask", "example_mask", "index"}


@pytest.mark.parametrize(
    ("rows", "options", "message"),
    [
        ([], {}, "no rows to make batches of"),
        (make(3), {"batch_size": 0}, "batch_size must be a positive integer, not 0"),
        (make(3), {"drop_last": True}, "drop_last leaves nothing: 3 rows fill no batch of 8"),
        (make(3), {"buckets": [1]}, "the longest bucket only 1"),
        ([{"text": "a"}], {}, "rows need a column 'input_ids'; there are text"),
        ([{"input_ids": [1]}, {"input_ids": [1], "labels": 1}], {}, "row 1 and row 0 .* has labels"),
        ([{"input_ids": [1]}, {"input_ids": []}], {}, "row 1 has no token"),
        ([{"input_ids": [1], "labels": "x"}], {}, "column 'labels' holds neither numbers nor lists"),
    ],
)
def test_bad_rows(rows, options, message):
    with pytest.raises(InputError, match=message):
        BucketBatcher(rows, **{"batch_size": 8, **options})
