"""Which padded lengths to use: few of them, because each is a compiled graph, yet with little padding."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator, Sequence
from itertools import takewhile

from mindpeft.errors import InputError

WORTH_A_SHAPE = 0.05  # one more shape must save this share of the tokens to pay for its compilation


def length_grid(longest: int) -> list[int]:
    """The candidates 16, 32, 48, 64, 96, 128, 192, 256... below ``longest``, and the first that holds it."""
    grid = list(takewhile(lambda length: length < longest, _grid()))
    return [*grid, next(length for length in _grid() if length >= longest)]


def _grid() -> Iterator[int]:
    length = 32
    yield 16
    while True:
        yield length
        yield length + length // 2
        length *= 2


def choose_buckets(
    lengths: Sequence[int], batch_size: int, *, max_buckets: int = 4, max_length: int | None = None
) -> list[int]:
    """Choose the padded lengths that a data set needs.

    Exact dynamic programming over ``length_grid``: for each number of buckets the choice with the fewest
    tokens, padding included; of these the smallest number that comes within 5 % of the best.

    Args:
        lengths: the length of each row, in tokens.
        batch_size: rows of a batch; rows that fill no batch of their bucket go to the next longer one.
        max_buckets: most shapes.
        max_length: no bucket is longer than this.

    Returns:
        Rising lengths; the last holds the longest row.
    """
    grid = length_grid(max(lengths))
    if max_length is not None:
        grid = [length for length in grid if length < max_length] + [max_length] * (grid[-1] >= max_length)
    ordered = sorted(lengths)
    full = [bisect_left(ordered, length + 1) // batch_size for length in grid]
    full[-1] = -(-len(ordered) // batch_size)
    best = _cheapest_by_count(grid, full, min(max_buckets, len(grid)))
    least = min(tokens for tokens, _ in best)
    return next(buckets for tokens, buckets in best if tokens * (1 - WORTH_A_SHAPE) <= least)


def _cheapest_by_count(grid: list[int], full: list[int], max_buckets: int) -> list[tuple[int, list[int]]]:
    """For 1, 2, ... buckets: the fewest ``batches x length`` up to the grid's last length, and the buckets.

    ``full[i]`` is the number of batches that rows of at most ``grid[i]`` tokens fill.
    """
    table = [(full[end] * grid[end], [grid[end]]) for end in range(len(grid))]
    answers = [table[-1]]
    for _ in range(1, max_buckets):
        table = [
            min(
                (table[start][0] + (full[end] - full[start]) * grid[end], [*table[start][1], grid[end]])
                for start in range(end)
            )
            if end
            else table[0]
            for end in range(len(grid))
        ]
        answers.append(table[-1])
    return answers


def check_buckets(buckets: Sequence[int], longest: int) -> list[int]:
    """Return given ``buckets`` in rising order, each once.

    Raises:
        InputError: one is not a positive integer, or none holds the longest row.
    """
    if not buckets or any(not isinstance(length, int) or length < 1 for length in buckets):
        raise InputError(f"buckets must be positive lengths in tokens, not {list(buckets)}")
    if max(buckets) < longest:
        raise InputError(
            f"the longest row has {longest} tokens but the longest bucket only {max(buckets)}: "
            f"add a bucket of {longest} or truncate to {max(buckets)}"
        )
    return sorted(set(buckets))
