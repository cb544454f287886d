"""Masks come in BERT's proportions, the same for the same seed and epoch, and never on special tokens."""

from __future__ import annotations

import numpy as np
import pytest

from mindpeft.data.batching import BucketBatcher
from mindpeft.data.masking import TokenMasker
from mindpeft.data.tokenization import AutoTokenizer
from mindpeft.errors import InputError


@pytest.fixture(scope="module")
def tokenizer(minilm_dir):
    return AutoTokenizer.from_pretrained(minilm_dir)


@pytest.fixture(scope="module")
def rows(tokenizer):
    encoded = tokenizer(["some words of a text that is long enough " * 10] * 203)
    return [{name: encoded[name][i] for name in encoded} for i in range(203)]


def epoch(batcher, number):
    batcher.set_epoch(number)
    return list(batcher)


def test_proportions(tokenizer, rows):
    plain = BucketBatcher(rows, 8)
    masked = BucketBatcher(rows, 8, transform=TokenMasker(tokenizer), seed=1)
    chosen = fate_mask = kept = real = 0
    for before, after in zip(plain, masked, strict=True):
        labels, ids = after["labels"], after["input_ids"]
        at = labels != -100
        np.testing.assert_array_equal(labels[at], before["input_ids"][at])
        np.testing.assert_array_equal(ids[~at], before["input_ids"][~at])
        assert not np.isin(before["input_ids"][at], tokenizer.all_special_ids).any()
        assert not at[before["example_mask"] == 0].any()
        assert labels.dtype == ids.dtype == np.int32
        chosen += at.sum()
        fate_mask += (ids[at] == tokenizer.mask_token_id).sum()
        kept += (ids[at] == before["input_ids"][at]).sum()
        real += (before["attention_mask"].sum(1) - 2)[before["example_mask"] == 1].sum()
    assert chosen / real == pytest.approx(0.15, abs=0.01)
    assert fate_mask / chosen == pytest.approx(0.8, abs=0.03)
    assert kept / chosen == pytest.approx(0.1, abs=0.02)


def test_fixed_by_seed_and_epoch(tokenizer, rows):
    batcher = BucketBatcher(rows, 8, transform=TokenMasker(tokenizer), seed=1)
    first, second, again = epoch(batcher, 0), epoch(batcher, 1), epoch(batcher, 0)
    np.testing.assert_array_equal(first[3]["labels"], again[3]["labels"])
    assert (first[3]["labels"] != second[3]["labels"]).any()


@pytest.mark.parametrize("probability", [0, 1, -0.1])
def test_probability_out_of_range(tokenizer, probability):
    with pytest.raises(InputError, match="masking probability must lie between 0 and 1"):
        TokenMasker(tokenizer, probability)


def test_tokenizer_without_mask(shared_dir):
    with pytest.raises(InputError, match="needs a tokenizer with a mask token"):
        TokenMasker(AutoTokenizer.from_pretrained(shared_dir / "tokenizers" / "gpt2"))
