"""Several short samples in one row, none of which sees another."""

from __future__ import annotations

from bisect import bisect_left, insort

from mindpeft.data.batching import Feature
from mindpeft.data.encoding import Features


def pack(features: Features, length: int) -> Features:
    """Put samples together in rows of at most ``length`` tokens (first fit, the longest first).

    Args:
        features: rows with ``input_ids`` and ``labels``, the first label of each -100; none is longer than
            ``length``.
        length: most tokens of a row.

    Returns:
        Rows with ``input_ids``, ``labels``; ``attention_mask``, which numbers the samples of a row 1, 2, ...:
        tokens see those of their own number alone; and ``position_ids``, which begin at 0 in each sample.
    """
    rows: list[list[Feature]] = []
    room: list[tuple[int, int]] = []  # (tokens left, row), sorted
    for feature in sorted(features, key=lambda row: -len(row["input_ids"])):
        size = len(feature["input_ids"])
        at = bisect_left(room, (size, 0))
        left, row = room.pop(at) if at < len(room) else (length, len(rows))
        if row == len(rows):
            rows.append([])
        rows[row].append(feature)
        insort(room, (left - size, row))
    return Features([_joined(row) for row in rows], features.truncated)


def _joined(samples: list[Feature]) -> Feature:
    joined: Feature = {"input_ids": [], "labels": [], "attention_mask": [], "position_ids": []}
    for number, sample in enumerate(samples, 1):
        size = len(sample["input_ids"])
        joined["input_ids"] += sample["input_ids"]
        joined["labels"] += sample["labels"]
        joined["attention_mask"] += [number] * size
        joined["position_ids"] += range(size)
    return joined
