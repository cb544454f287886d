"""From a recipe's data section to the examples to train on and to measure on."""

from __future__ import annotations

import os
import random
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from mindpeft.cli.model_loading import check_max_length
from mindpeft.console import logger
from mindpeft.data.conversations import ConversationDataset, read_conversations
from mindpeft.data.encoding import Features, encode
from mindpeft.data.instructions import (
    InstructionFormat,
    choose_template,
    encode_conversations,
    encode_texts,
)
from mindpeft.data.label_map import LabelMap
from mindpeft.data.packing import pack
from mindpeft.data.readers import FORMATS, Row, Table, read_table
from mindpeft.data.text_dataset import UNLABELLED, TextDataset, build_text_dataset
from mindpeft.data.tokenization import Tokenizer
from mindpeft.errors import InputError
from mindpeft.recipe_sections import LANGUAGE_TASKS, DataSection

Dataset = TextDataset | ConversationDataset
_LANGUAGE_LENGTH = 1024  # tokens of a row of a language task where nothing says


@dataclass(frozen=True)
class Splits:
    """The parts of a data set; ``eval`` is looked at while training, ``test`` once at the end."""

    train: Dataset
    eval: Dataset | None
    test: Dataset | None

    @property
    def label_map(self) -> LabelMap | None:
        """The labels that training knows."""
        return self.train.label_map


def load_splits(data: DataSection, seed: int) -> Splits:
    """Read all files of a recipe; labels are learnt from the training part alone.

    Raises:
        InputError: a file, column, row or label is wrong; the message names the line.
    """
    tables = _builtin_tables(data.task) if data.builtin else {}
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
) -> Dataset:
    """The examples of a table as a recipe's data section describes it."""
    if data.task == "instruction":
        return ConversationDataset(read_conversations(table), table.source)
    has_labels = with_labels and data.task not in UNLABELLED
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


def to_features(
    dataset: Dataset, tokenizer: Tokenizer, max_length: int | None, data: DataSection | None = None
) -> Features:
    """Tokenise, and say how many texts were cut.

    Args:
        dataset: the examples.
        tokenizer: the model's.
        max_length: most tokens of a row.
        data: how conversations become text, and whether rows are packed.
    """
    length = max_length
    if isinstance(dataset, ConversationDataset):
        template = choose_template(tokenizer, data.template if data else None)
        form = InstructionFormat(template, data is not None and data.train_on_prompt)
        features = encode_conversations(dataset.examples, tokenizer, form, length)
    elif dataset.task == "causal_lm":
        features = encode_texts([example.text for example in dataset.examples], tokenizer, length)
    else:
        features = encode(dataset, tokenizer, length)
    if features.truncated:
        logger.info(
            "%s: %d of %d texts cut to %d tokens", dataset.source, features.truncated, len(dataset), length
        )
    if data is not None and data.packing:
        rows, features = len(features), pack(features, length)
        logger.info("%s: %d samples packed into %d rows", dataset.source, rows, len(features))
    return features


def row_length(data: DataSection | None, task: str, config: Any, tokenizer: Tokenizer) -> int | None:
    """The most tokens of a row: what the recipe says, else what model and task take.

    Raises:
        InputError: the recipe says more than the model has positions.
    """
    asked = data.max_length if data else None
    length = check_max_length(asked, config, tokenizer)
    if asked is None and task in LANGUAGE_TASKS:
        return min(length or _LANGUAGE_LENGTH, _LANGUAGE_LENGTH)
    return length


def _builtin_tables(task: str) -> dict[str, Table]:
    """The embedded data; its held-out part is the test part. For instructions the topic is the answer."""
    from mindpeft.data.stdlib_docs import load_stdlib_docs

    tables = dict(zip(("train", "test"), load_stdlib_docs(), strict=True))
    if task != "instruction":
        return tables
    return {name: _as_questions(table) for name, table in tables.items()}


def _as_questions(table: Table) -> Table:
    rows = [
        Row(row.line, {"prompt": row.values["text"], "completion": row.values["label"]}) for row in table.rows
    ]
    return Table(table.source, ("prompt", "completion"), rows)


def _hold_out(dataset: Dataset, share: float, seed: int) -> tuple[Dataset, Dataset]:
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
