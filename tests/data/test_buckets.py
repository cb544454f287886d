"""The chosen lengths are few, hold every row, and cost what an exhaustive search finds."""

from __future__ import annotations

import itertools
import random

import pytest

from mindpeft.data.buckets import check_buckets, choose_buckets, length_grid
from mindpeft.errors import InputError


def tokens(lengths, buckets, batch_size):
    """Tokens of an epoch by the rule itself: rows that fill no batch go up."""
    total, left = 0, 0
    for low, high in itertools.pairwise([0, *buckets]):
        left += sum(low < length <= high for length in lengths)
        batches = -(-left // batch_size) if high == buckets[-1] else left // batch_size
        total += batches * batch_size * high
        left -= batches * batch_size
    return total


def test_grid():
    assert length_grid(512) == [16, 32, 48, 64, 96, 128, 192, 256, 384, 512]
    assert length_grid(1) == [16]
    assert length_grid(33) == [16, 32, 48]
    assert length_grid(2000)[-2:] == [1536, 2048]


@pytest.mark.parametrize("seed", range(20))
def test_choice_is_the_cheapest(seed):
    rng = random.Random(seed)
    lengths = [min(512, int(rng.lognormvariate(3.5, 0.8)) + 1) for _ in range(rng.randint(5, 400))]
    batch_size, grid = rng.choice([1, 4, 8, 32]), length_grid(max(lengths))
    best = {}
    for count in range(1, min(4, len(grid)) + 1):
        for inner in itertools.combinations(grid[:-1], count - 1):
            cost = tokens(lengths, [*inner, grid[-1]], batch_size)
            best[count] = min(best.get(count, cost), cost)
    chosen = choose_buckets(lengths, batch_size)
    cost = tokens(lengths, chosen, batch_size)
    assert cost == best[len(chosen)]
    assert cost * 0.95 <= min(best.values())
    assert all(best[fewer] * 0.95 > min(best.values()) for fewer in range(1, len(chosen)))


def test_limits():
    lengths = list(range(1, 401))
    assert len(choose_buckets(lengths, 4, max_buckets=2)) == 2
    assert choose_buckets(lengths, 4, max_buckets=1) == [512]
    assert choose_buckets([*range(1, 51)], 4, max_length=50)[-1] == 50
    assert choose_buckets([10] * 9, 4, max_length=512) == [16]
    assert choose_buckets([10] * 9, 4, max_length=12) == [12]


def test_given_buckets():
    assert check_buckets([64, 32, 64], 64) == [32, 64]
    with pytest.raises(InputError, match=r"longest row has 65 tokens but the longest bucket only 64"):
        check_buckets([64], 65)
    for wrong in ([], [0], ["64"], [-1, 64]):
        with pytest.raises(InputError, match="buckets must be positive lengths"):
            check_buckets(wrong, 10)
