"""Any ``mindspore.dataset.Dataset`` (MindRecord files, generators, what mindnlp loads) as features."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import mindspore.dataset
import numpy as np

from mindpeft.data.batching import Feature
from mindpeft.data.encoding import Features, encode
from mindpeft.data.label_map import LabelMap
from mindpeft.data.readers import Row, Table
from mindpeft.data.text_dataset import build_text_dataset
from mindpeft.data.tokenization import Tokenizer
from mindpeft.errors import InputError

LABEL_COLUMNS = ("labels", "label")
TOKEN_COLUMNS = ("token_type_ids", "attention_mask")


def is_tokenised(dataset: mindspore.dataset.Dataset) -> bool:
    """Whether the rows hold token ids already, in a column ``input_ids``."""
    return "input_ids" in dataset.get_col_names()


def features_from_mindspore(
    dataset: mindspore.dataset.Dataset, *, label_column: str | None = None
) -> list[Feature]:
    """The rows of a data set that is tokenised already, read into memory.

    Batches are taken apart and padding (where ``attention_mask`` is 0 at the end) is cut off, so that the
    rows can be shuffled and bucketed.

    Args:
        dataset: has ``input_ids``, of (length,) or (batch, length); perhaps ``attention_mask`` (1 everywhere
            if absent), ``token_type_ids`` and labels: a number a row, floats a row, or an integer a token.
            Other columns of numbers (``start_positions``) are kept, columns of text are left out.
        label_column: the column that becomes ``labels``; ``labels`` or ``label`` if None.

    Returns:
        Features as ``encode`` gives them.

    Raises:
        InputError: no such column, no rows, or a column that fits no kind.
    """
    names = dataset.get_col_names()
    if not is_tokenised(dataset):
        raise InputError(f"the data set has no column 'input_ids'; its columns are {', '.join(names)}")
    label_column = _label_column(names, label_column)
    features = [_feature(row, label_column) for row in _rows(dataset, "input_ids", token_rank=1)]
    if not features:
        raise InputError("the data set has no rows")
    return features


def table_from_mindspore(dataset: mindspore.dataset.Dataset) -> Table:
    """The rows of a data set of texts and labels as a table; ``line`` is the row's number, from 1.

    Raises:
        InputError: no rows.
    """
    names = dataset.get_col_names()
    rows = [
        Row(number, {name: value.tolist() for name, value in row.items()})
        for number, row in enumerate(_rows(dataset, names[0], token_rank=0), 1)
    ]
    if not rows:
        raise InputError("the data set has no rows")
    return Table("the MindSpore data set", tuple(names), rows)


def encode_mindspore(
    dataset: mindspore.dataset.Dataset,
    tokenizer: Tokenizer,
    *,
    text_column: str = "text",
    text_pair_column: str | None = None,
    label_column: str | None = None,
    task: str = "single_label_classification",
    labels: LabelMap | Sequence[str] | None = None,
    max_length: int | None = None,
) -> tuple[Features, LabelMap | None]:
    """Tokenise a data set of texts.

    Args:
        dataset: rows or batches with a text column and perhaps labels.
        tokenizer, max_length: see ``encode``.
        text_column, text_pair_column, task, labels: see ``build_text_dataset``.
        label_column: the column of the labels; ``labels`` or ``label`` if None.

    Returns:
        The features, and the label map if the data has named labels.

    Raises:
        InputError: a missing column, or a row that does not fit the task; its number is named as a line.
    """
    examples = build_text_dataset(
        table_from_mindspore(dataset),
        text_column=text_column,
        text_pair_column=text_pair_column,
        label_column=_label_column(dataset.get_col_names(), label_column),
        task=task,
        labels=labels,
    )
    return encode(examples, tokenizer, max_length), examples.label_map


def _label_column(names: Sequence[str], wanted: str | None) -> str | None:
    if wanted is None:
        return next((name for name in LABEL_COLUMNS if name in names), None)
    if wanted not in names:
        raise InputError(f"the data set has no column {wanted!r}; its columns are {', '.join(names)}")
    return wanted


def _rows(
    dataset: mindspore.dataset.Dataset, leading: str, token_rank: int
) -> Iterator[dict[str, np.ndarray]]:
    """Single rows. Where the column ``leading`` has more than ``token_rank`` axes, items are batches."""
    for item in dataset.create_dict_iterator(num_epochs=1, output_numpy=True):
        if item[leading].ndim > token_rank:
            for index in range(len(item[leading])):
                yield {name: column[index] for name, column in item.items()}
        else:
            yield item


def _feature(row: dict[str, np.ndarray], label_column: str | None) -> Feature:
    width = len(row["input_ids"])
    mask = row.get("attention_mask", np.ones(width, np.int32))
    length = int(np.flatnonzero(mask)[-1]) + 1 if mask.any() else 0
    feature: dict[str, Any] = {"input_ids": row["input_ids"][:length].astype(np.int32)}
    feature["attention_mask"] = mask[:length].astype(np.int32)
    for name, value in row.items():
        other_label = name in LABEL_COLUMNS and name != label_column
        text = value.dtype.kind not in "iufb" and name != label_column
        if name in feature or other_label or text:
            continue
        key = "labels" if name == label_column else name
        feature[key] = _value(key, value, width, length)
    return feature


def _value(name: str, value: np.ndarray, width: int, length: int) -> Any:
    """A column of one row: cut like the tokens, a plain number, or a vector of floats."""
    if value.dtype.kind not in "iufb":
        raise InputError(f"column {name!r} of the data set holds {value.dtype}, not numbers")
    integral = value.dtype.kind != "f"
    if name in TOKEN_COLUMNS or (value.shape == (width,) and integral and width > 1):
        return value[:length].astype(np.int32)
    if value.size == 1:
        return int(value.item()) if integral else float(value.item())
    return value.astype(np.float32)
