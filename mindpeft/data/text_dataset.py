"""Rows of a table to examples: the texts and the label that a task needs, checked, with the line of each."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from mindpeft.data.label_map import LabelMap
from mindpeft.data.readers import Row, Table, read_table
from mindpeft.errors import InputError, did_you_mean

TASKS = (
    "single_label_classification",
    "multi_label_classification",
    "regression",
    "token_classification",
    "masked_lm",
    "causal_lm",
)
UNLABELLED = ("masked_lm", "causal_lm")  # these make their own labels


@dataclass(frozen=True)
class TextExample:
    """One example.

    Attributes:
        text: the text; for token classification its words.
        text_pair: the second text, if the task has two.
        label: a label id; multi-hot floats; a float; or a label id a word. None if the data has no labels.
        line: the line of the source on which the row began.
    """

    text: str | list[str]
    text_pair: str | None = None
    label: int | float | list[float] | list[int] | None = None
    line: int | None = None


@dataclass(frozen=True)
class TextDataset:
    """Examples of one task.

    Attributes:
        examples: in the order of the source.
        task: one of ``TASKS``.
        label_map: names of the label ids; None for regression, masked language modelling and unlabelled text.
        source: where the examples come from, for messages.
    """

    examples: list[TextExample]
    task: str
    label_map: LabelMap | None
    source: str

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, index: int) -> TextExample:
        return self.examples[index]


def load_text_dataset(
    path: str | os.PathLike,
    *,
    text_column: str,
    text_pair_column: str | None = None,
    label_column: str | None = None,
    task: str = "single_label_classification",
    labels: LabelMap | Sequence[str] | None = None,
    label_separator: str = "|",
    **reader_options: Any,
) -> TextDataset:
    """Read a file into examples; see ``build_text_dataset`` and, for ``reader_options``, ``read_table``."""
    return build_text_dataset(
        read_table(path, **reader_options),
        text_column=text_column,
        text_pair_column=text_pair_column,
        label_column=label_column,
        task=task,
        labels=labels,
        label_separator=label_separator,
    )


def build_text_dataset(
    table: Table,
    *,
    text_column: str,
    text_pair_column: str | None = None,
    label_column: str | None = None,
    task: str = "single_label_classification",
    labels: LabelMap | Sequence[str] | None = None,
    label_separator: str = "|",
) -> TextDataset:
    """Turn the rows of a table into examples.

    Args:
        table: the rows.
        text_column: the column of the text; for token classification, words between spaces, or a list.
        text_pair_column: the column of the second text.
        label_column: the column of the labels; None for text without labels. A cell holds: a name or number
            (single label); names separated by ``label_separator``, or a list (multi label, none of them if
            empty); a finite number (regression); as many tags as words (token classification).
        task: one of ``TASKS``.
        labels: the label map that training made, or the names in the order of their ids; learnt if None.
        label_separator: see ``label_column``.

    Raises:
        InputError: an unknown task or column, an empty text, a missing, unknown or malformed label; the
            message names the line.
    """
    if task not in TASKS:
        raise InputError(f"unknown task {task!r}: use one of {', '.join(TASKS)}{did_you_mean(task, TASKS)}")
    if task in UNLABELLED and label_column is not None:
        raise InputError(f"{task} makes its own labels: leave out label_column ({label_column!r})")
    if task == "token_classification" and text_pair_column is not None:
        raise InputError("token_classification takes one text: leave out text_pair_column")
    for column in (text_column, text_pair_column, label_column):
        if column is not None:
            table.require(column)
    read = _words if task == "token_classification" else _text
    texts = [read(table, row, text_column) for row in table.rows]
    pairs: list[str | None] = [None] * len(texts)
    if text_pair_column is not None:
        pairs = [_text(table, row, text_pair_column) for row in table.rows]
    label_map, targets = None, [None] * len(texts)
    if label_column is not None:
        label_map, label_of = _label_reader(table, label_column, task, labels, label_separator)
        targets = [label_of(row) for row in table.rows]
    examples = []
    for row, text, pair, target in zip(table.rows, texts, pairs, targets, strict=True):
        if isinstance(target, list) and isinstance(text, list) and len(target) != len(text):
            raise table.error(row, f"{len(text)} words but {len(target)} tags in {label_column!r}")
        examples.append(TextExample(text, pair, target, row.line))
    return TextDataset(examples, task, label_map, table.source)


def _text(table: Table, row: Row, column: str) -> str:
    text = row.values.get(column)
    if text is None:
        raise table.error(row, f"no text in column {column!r}")
    if not isinstance(text, str):
        raise table.error(row, f"column {column!r} holds {str(text)[:40]!r}, not text")
    if not text.strip():
        raise table.error(row, f"empty text in column {column!r}")
    return _checked(table, row, column, text)


def _words(table: Table, row: Row, column: str) -> list[str]:
    words = row.values.get(column)
    if isinstance(words, list) and words and all(isinstance(word, str) and word for word in words):
        return [_checked(table, row, column, word) for word in words]
    if isinstance(words, list):
        raise table.error(row, f"column {column!r} must hold words, each with a character")
    return _split(_text(table, row, column))


def _split(cell: str) -> list[str]:
    """The parts between spaces. (Bare ``str.split`` would lose words that are exotic white space.)"""
    return [part for part in cell.strip().split(" ") if part]


def _checked(table: Table, row: Row, column: str, text: str) -> str:
    """``text`` unless JSON escapes made it hold half a character, which no tokenizer takes."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise table.error(row, f"column {column!r} holds half a surrogate pair at {error.start}") from error
    return text


def _label_reader(
    table: Table, column: str, task: str, labels: LabelMap | Sequence[str] | None, separator: str
) -> tuple[LabelMap | None, Callable[[Row], Any]]:
    """The label map (learnt from the table unless given) and the function from a row to its label."""
    if task == "regression":
        return None, lambda row: _number(table, row, column)
    parse = {
        "single_label_classification": lambda row: [_single(table, row, column)],
        "multi_label_classification": lambda row: _several(table, row, column, separator),
        "token_classification": lambda row: _several(table, row, column, " "),
    }[task]
    if labels is None:
        label_map = LabelMap.learn(name for row in table.rows for name in parse(row))
        _check_learnt(table, column, task, label_map)
    else:
        label_map = labels if isinstance(labels, LabelMap) else LabelMap.from_names(labels)

    def label_of(row: Row) -> int | list[float] | list[int]:
        names = parse(row)
        try:
            ids = [label_map.id_of(name) for name in names]
        except InputError as error:
            raise table.error(row, str(error)) from error
        if task == "single_label_classification":
            return ids[0]
        if task == "token_classification":
            return ids
        return [float(index in ids) for index in range(len(label_map))]

    return label_map, label_of


def _check_learnt(table: Table, column: str, task: str, label_map: LabelMap) -> None:
    least = 2 if task == "single_label_classification" else 1
    if len(label_map) < least:
        found = f"the only label is {label_map.names[0]!r}" if label_map.names else "there is no label"
        raise InputError(f"{table.source}: nothing to learn in column {column!r}: {found}")


def _cell(table: Table, row: Row, column: str) -> Any:
    value = row.values.get(column)
    if value is None:
        raise table.error(row, f"no label in column {column!r}")
    return value


def _single(table: Table, row: Row, column: str) -> Any:
    value = _cell(table, row, column)
    if isinstance(value, list | dict):
        raise table.error(row, f"column {column!r} holds {str(value)[:40]}, not one label")
    if isinstance(value, str) and not value.strip():
        raise table.error(row, f"no label in column {column!r}")
    return value


def _several(table: Table, row: Row, column: str, separator: str) -> list[Any]:
    value = _cell(table, row, column)
    if isinstance(value, list):
        if any(isinstance(part, list | dict) or part is None or part == "" for part in value):
            raise table.error(row, f"column {column!r} must hold a list of labels, not {str(value)[:40]}")
        return value
    if isinstance(value, dict):
        raise table.error(row, f"column {column!r} must hold labels, not {str(value)[:40]}")
    parts = [part.strip() for part in str(value).strip().split(separator)]
    if separator == " " or parts == [""]:
        return [part for part in parts if part]
    if "" in parts:
        raise table.error(
            row, f"an empty label between {separator!r} in column {column!r}: {str(value)[:40]!r}"
        )
    return parts


def _number(table: Table, row: Row, column: str) -> float:
    value = _cell(table, row, column)
    try:
        number = math.nan if isinstance(value, bool | list | dict) else float(value)
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        raise table.error(row, f"column {column!r} must hold a finite number, not {str(value)[:40]!r}")
    return number
