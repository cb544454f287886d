"""Examples to features: token ids and labels, ready for ``BucketBatcher``."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from mindpeft.data.batching import IGNORE_INDEX, Feature
from mindpeft.data.text_dataset import TextDataset, TextExample
from mindpeft.data.tokenization import BatchEncoding, Tokenizer

CHUNK = 1000  # examples tokenised at once: enough for all cores, little memory


class Features(list[Feature]):
    """A list of features that knows how many texts were cut.

    Attributes:
        truncated: number of examples longer than ``max_length`` tokens.
    """

    def __init__(self, rows: Iterable[Feature] = (), truncated: int = 0):
        super().__init__(rows)
        self.truncated = truncated


def encode(dataset: TextDataset, tokenizer: Tokenizer, max_length: int | None = None) -> Features:
    """Tokenise a data set; longer texts are cut (a pair loses tokens from its longer side).

    Args:
        dataset: the examples.
        tokenizer: the model's tokenizer.
        max_length: most tokens of an example, special tokens included; the model's limit if None.

    Returns:
        For each example, in order: the tokenizer's columns (lists of int, not padded) and, if the data has
        labels, ``labels``: an int, a float, a list of floats, or an int a token (the word's label on its
        first token, -100 elsewhere).

    Raises:
        InputError: ``max_length`` leaves no room for text.
    """
    features = Features()
    for start in range(0, len(dataset), CHUNK):
        examples = dataset.examples[start : start + CHUNK]
        pairs = [example.text_pair for example in examples]
        encoding = tokenizer(
            [example.text for example in examples],
            None if pairs[0] is None else pairs,
            max_length=max_length,
            is_split_into_words=dataset.task == "token_classification",
        )
        features.truncated += encoding.truncated
        features += [_feature(encoding, row, example) for row, example in enumerate(examples)]
    return features


def _feature(encoding: BatchEncoding, row: int, example: TextExample) -> Feature:
    feature: dict[str, Any] = {name: values[row] for name, values in encoding.items()}
    if example.label is None:
        return feature
    words_have_labels = isinstance(example.text, list)
    feature["labels"] = _align(encoding.word_ids(row), example.label) if words_have_labels else example.label
    return feature


def _align(word_ids: list[int | None], labels: list[int]) -> list[int]:
    """The label of each word on its first token, -100 on special tokens and the rest of a word."""
    before = [None, *word_ids]
    return [
        labels[word] if word is not None and word != previous else IGNORE_INDEX
        for previous, word in zip(before, word_ids, strict=False)
    ]
