"""Features are the tokenizer's ids with labels in the right places."""

from __future__ import annotations

import pytest

from mindpeft.data.encoding import encode
from mindpeft.data.label_map import LabelMap
from mindpeft.data.text_dataset import TextDataset, TextExample
from mindpeft.data.tokenization import AutoTokenizer


@pytest.fixture(scope="module")
def tokenizer(minilm_dir):
    return AutoTokenizer.from_pretrained(minilm_dir)


def test_single_texts_in_order_and_over_a_chunk(tokenizer):
    examples = [TextExample(f"row number {n}", label=n % 3) for n in range(2005)]
    features = encode(TextDataset(examples, "single_label_classification", None, "test"), tokenizer)
    assert len(features) == 2005
    assert features[2004] == {**tokenizer("row number 2004"), "labels": 0}
    assert features.truncated == 0


def test_truncation_is_counted(tokenizer):
    texts = ["short", "long " * 30, "also long " * 20, "fits in ten tokens quite"]
    data = TextDataset([TextExample(text) for text in texts], "masked_lm", None, "test")
    features = encode(data, tokenizer, max_length=10)
    assert [len(row["input_ids"]) for row in features] == [3, 10, 10, 8]
    assert features.truncated == 2
    assert "labels" not in features[0]


def test_pairs(tokenizer):
    data = TextDataset([TextExample("a", "b", 0.5), TextExample("c", "d", 1.5)], "regression", None, "test")
    features = encode(data, tokenizer)
    assert features[1] == {**tokenizer("c", "d"), "labels": 1.5}
    assert features[1]["token_type_ids"] == [0, 0, 0, 1, 1]


def test_labels_of_words_stand_on_first_tokens(tokenizer):
    words, labels = ["unaffable", "\u200b", "北京", "x", "x"], [1, 2, 3, 4, 5]
    data = TextDataset([TextExample(words, label=labels)], "token_classification", LabelMap(("O",)), "test")
    (row,) = encode(data, tokenizer)
    tokens = tokenizer.convert_ids_to_tokens(row["input_ids"])
    assert tokens == ["[CLS]", "una", "##ffa", "##ble", "北", "京", "x", "x", "[SEP]"]
    assert row["labels"] == [-100, 1, -100, -100, 3, -100, 4, 5, -100]
    (cut,) = encode(data, tokenizer, max_length=6)
    assert cut["labels"] == [-100, 1, -100, -100, 3, -100]
