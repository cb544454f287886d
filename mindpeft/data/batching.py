"""Batches of few fixed shapes out of rows of any length, so that a graph is compiled a few times only."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from mindpeft.data.buckets import check_buckets, choose_buckets
from mindpeft.errors import InputError

IGNORE_INDEX = -100  # the label that the losses of Hugging Face leave out
Feature = dict[str, Any]
Batch = dict[str, np.ndarray]


class BucketBatcher:
    """Batches of exactly ``(batch_size, bucket_length)``, in an order fixed by (seed, epoch).

    Rows go to the shortest bucket that holds them; rows left over when a bucket's batches are full go to the
    next longer one. So an epoch has ``ceil(rows / batch_size)`` batches, and only its longest bucket has one
    that is filled up with padding rows.

    A batch holds, as numpy arrays:

    - each column of the features: token columns (input_ids, attention_mask, token_type_ids, labels of
      tokens) as int32 (batch_size, length); one number a row as int32 or float32 (batch_size,); a list of
      floats a row, as multi-label targets are, as float32 (batch_size, n);
    - ``example_mask``, float32 (batch_size,): 1 for a row of the data, 0 for a padding row. Weigh each row's
      loss with it, whatever the task;
    - ``index``, int32 (batch_size,): the row's place in ``features``, -1 for a padding row.

    A padding row has labels of -100 (0 where they are floats) and attends to its first position alone.

    Attributes:
        buckets: the padded lengths, rising.
        shapes: ``(batch_size, length)`` -> number of batches an epoch; only shapes that occur.
        padding_share: the part of all tokens of an epoch that is padding, 0..1.
    """

    def __init__(
        self,
        features: Sequence[Feature],
        batch_size: int,
        *,
        pad_token_id: int = 0,
        buckets: Sequence[int] | None = None,
        max_buckets: int = 4,
        max_length: int | None = None,
        shuffle: bool = False,
        seed: int = 0,
        drop_last: bool = False,
        transform: Callable[[Batch, np.random.Generator], Batch] | None = None,
    ):
        """Sort the rows into buckets.

        Args:
            features: rows as ``encode`` gives them; each has ``input_ids`` and the same columns.
            batch_size: rows of a batch.
            pad_token_id: what fills up ``input_ids``.
            buckets: padded lengths in tokens; chosen from the rows' lengths if None.
            max_buckets: most shapes, where they are chosen.
            max_length: no chosen bucket is longer than this.
            shuffle: random rows in each batch and random order of the batches, new in each epoch;
                else buckets from short to long, rows in the order of ``features``.
            seed: fixes the order.
            drop_last: leave the incomplete batch out.
            transform: called with each batch and a generator that (seed, epoch, batch number) fixes.

        Raises:
            InputError: no rows, a row that differs from the others, or buckets that hold no row.
        """
        if not isinstance(batch_size, int) or batch_size < 1:
            raise InputError(f"batch_size must be a positive integer, not {batch_size!r}")
        if not features:
            raise InputError("there are no rows to make batches of")
        if drop_last and len(features) < batch_size:
            raise InputError(f"drop_last leaves nothing: {len(features)} rows fill no batch of {batch_size}")
        self._features = features
        self._columns = _Columns(features, pad_token_id)
        self._lengths = [len(row["input_ids"]) for row in features]
        if buckets is None:
            limits = {"max_buckets": max_buckets, "max_length": max_length}
            buckets = choose_buckets(self._lengths, batch_size, **limits)
        self.buckets = check_buckets(buckets, max(self._lengths))
        self.batch_size, self._shuffle, self._seed, self._drop_last = batch_size, shuffle, seed, drop_last
        self._transform = transform
        self.set_epoch(0)
        self.shapes: dict[tuple[int, int], int] = {}
        for length, _ in self._plan():
            shape = (batch_size, length)
            self.shapes[shape] = self.shapes.get(shape, 0) + 1
        kept = sum(self._lengths[row] for _, rows in self._plan() for row in rows)
        self.padding_share = 1 - kept / sum(rows * length * n for (rows, length), n in self.shapes.items())

    def set_epoch(self, epoch: int, skip_batches: int = 0) -> None:
        """Choose the epoch that the next iteration gives; a resumed run skips its first ``skip_batches``."""
        self.epoch, self._skip = epoch, skip_batches

    def __len__(self) -> int:
        """Batches of a whole epoch."""
        return sum(self.shapes.values())

    def __iter__(self) -> Iterator[Batch]:
        plan = self._plan()
        for number in range(self._skip, len(plan)):
            length, rows = plan[number]
            batch = self._columns.stack([self._features[row] for row in rows], self.batch_size, length)
            batch["index"] = np.full(self.batch_size, -1, np.int32)
            batch["index"][: len(rows)] = rows
            if self._transform is not None:
                batch = self._transform(batch, np.random.default_rng([self._seed, self.epoch, number]))
            yield batch

    def _plan(self) -> list[tuple[int, list[int]]]:
        """(length, rows) of each batch of this epoch, in order."""
        order = np.arange(len(self._features))
        random = np.random.default_rng([self._seed, self.epoch])
        if self._shuffle:
            random.shuffle(order)
        waiting: dict[int, list[int]] = {length: [] for length in self.buckets}
        for row in order.tolist():
            waiting[self.buckets[bisect_left(self.buckets, self._lengths[row])]].append(row)
        plan, left = [], []
        for length in self.buckets:
            rows = left + waiting[length]
            full = len(rows) // self.batch_size * self.batch_size
            plan += [(length, rows[at : at + self.batch_size]) for at in range(0, full, self.batch_size)]
            left = rows[full:]
        if left and not self._drop_last:
            plan.append((self.buckets[-1], left))
        if self._shuffle:
            random.shuffle(plan)
        return plan


class _Columns:
    """How each column of the features becomes an array: kind, type and fill value, decided once."""

    def __init__(self, features: Sequence[Feature], pad_token_id: int):
        first = features[0]
        if "input_ids" not in first:
            raise InputError(f"rows need a column 'input_ids'; there are {', '.join(sorted(first))}")
        for row, feature in enumerate(features):
            if feature.keys() != first.keys():
                odd = ", ".join(sorted(feature.keys() ^ first.keys()))
                raise InputError(f"row {row} and row 0 have different columns: only one of them has {odd}")
            if len(feature["input_ids"]) == 0:
                raise InputError(f"row {row} has no token")
        self._fill = {"input_ids": pad_token_id}
        self._kinds = {name: _kind(name, first[name]) for name in first}
        self._vector_sizes = {
            name: len(first[name]) for name, kind in self._kinds.items() if kind == "vector"
        }

    def stack(self, rows: list[Feature], batch_size: int, length: int) -> Batch:
        """The arrays of one batch, filled up to ``batch_size`` rows of ``length`` tokens."""
        batch = {name: self._empty(name, kind, batch_size, length) for name, kind in self._kinds.items()}
        for name, kind in self._kinds.items():
            for at, row in enumerate(rows):
                if kind == "tokens":
                    batch[name][at, : len(row[name])] = row[name]
                else:
                    batch[name][at] = row[name]
        if "attention_mask" in batch:
            batch["attention_mask"][len(rows) :, 0] = 1  # a softmax over nothing would be NaN
        batch["example_mask"] = (np.arange(batch_size) < len(rows)).astype(np.float32)
        return batch

    def _empty(self, name: str, kind: str, batch_size: int, length: int) -> np.ndarray:
        if kind == "vector":
            return np.zeros((batch_size, self._vector_sizes[name]), np.float32)
        if kind == "float":
            return np.zeros(batch_size, np.float32)
        default = IGNORE_INDEX if name == "labels" or kind == "int" else 0
        shape = (batch_size, length) if kind == "tokens" else (batch_size,)
        return np.full(shape, self._fill.get(name, default), np.int32)


def _kind(name: str, value: Any) -> str:
    """``int`` or ``float`` for a number a row, ``tokens`` for integers, ``vector`` for floats."""
    array = np.asarray(value)
    kinds = {(0, "i"): "int", (0, "f"): "float", (1, "i"): "tokens", (1, "f"): "vector"}
    kind = kinds.get((array.ndim, array.dtype.kind))
    if kind is None:
        raise InputError(f"column {name!r} holds neither numbers nor lists of numbers: {value!r}")
    return kind
