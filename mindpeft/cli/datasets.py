"""From a recipe's data section to the examples to train on and to measure on."""

from __future__ import annotations

import os
import random
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from mindpeft.console import logger
from mindpeft.data.encoding import Features, encode
from mindpeft.data.label_map import LabelMap
from mindpeft.data.readers import FORMATS, Table, read_table
from mindpeft.data.text_dataset import TextDataset, build_text_dataset
from mindpeft.data.tokenization import Tokenizer
from mindpeft.errors import InputError
from mindpeft.recipe import DataSection


@dataclass(frozen=True)
class Splits:
    """The parts of a data set; ``eval`` is looked at while training, ``test`` once at the end."""

    train: TextDataset
    eval: TextDataset | None
    test: TextDataset | None

    @property
    def label_map(self) -> LabelMap | None:
        """The labels that training knows."""
        return self.train.label_map


def load_splits(data: DataSection, seed: int) -> Splits:
    """Read all files of a recipe; labels are learnt from the training part alone.

    Raises:
        InputError: a file, column, row or label is wrong; the message names the line.
    """
    tables = _builtin_tables() if data.builtin else {}
    for name in ("train", "eval", "test"):
        path = getattr(data, name)
        if path is not None:
            tables[name] = read_table(path, **data.reader_options)
    train = to_dataset(tables["train"], data, labels=data.labels)
    rest = {
        name: to_dataset(tables[name], data, labels=train.label_map) if name in tables else None
        for name in ("eval", "test")
    }
    if data.eval_share is not None and rest["eval"] is None:
        train, rest["eval"] = _hold_out(train, data.eval_share, seed)
    return Splits(train, **rest)


def to_dataset(
    table: Table, data: DataSection, labels: LabelMap | list[Any] | None, with_labels: bool = True
) -> TextDataset:
    """The examples of a table as a recipe's data section describes it."""
    has_labels = with_labels and data.task != "masked_lm"
    return build_text_dataset(
        table,
        text_column=data.text,
        text_pair_column=data.text_pair,
        label_column=data.label if has_labels else None,
        task=data.task,
        labels=labels,
        label_separator=data.label_separator,
    )


def read_like(path: str | os.PathLike, data: DataSection) -> Table:
    """Read a file as training read its own, as far as the two have one format."""
    format = FORMATS.get(Path(path).suffix.lower())
    trained_on = data.format or FORMATS.get(Path(data.train or "").suffix.lower())
    if format in (None, trained_on):
        return read_table(path, **data.reader_options)
    return read_table(path, encoding=data.encoding)


def to_features(dataset: TextDataset, tokenizer: Tokenizer, max_length: int | None) -> Features:
    """Tokenise, and say how many texts were cut."""
    features = encode(dataset, tokenizer, max_length)
    if features.truncated:
        logger.info(
            "%s: %d of %d texts cut to %d tokens",
            dataset.source,
            features.truncated,
            len(dataset),
            max_length,
        )
    return features


def _builtin_tables() -> dict[str, Table]:
    """The embedded data; its held-out part is the test part."""
    from mindpeft.data.stdlib_docs import load_stdlib_docs

    return dict(zip(("train", "test"), load_stdlib_docs(), strict=True))


def _hold_out(dataset: TextDataset, share: float, seed: int) -> tuple[TextDataset, TextDataset]:
    """(rest, held out), chosen at random by ``seed`` alone."""
    count = round(len(dataset) * share)
    if not 0 < count < len(dataset):
        raise InputError(f"data.eval_share {share} of {len(dataset)} rows leaves one part empty")
    order = list(range(len(dataset)))
    random.Random(seed).shuffle(order)
    held = set(order[:count])
    parts = ([], [])
    for index, example in enumerate(dataset.examples):
        parts[index in held].append(example)
    return replace(dataset, examples=parts[0]), replace(dataset, examples=parts[1])
