"""From any data set a user may hold to batches, and from a batch to the model's inputs."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from itertools import islice
from typing import Any, Protocol

import mindspore.dataset
import numpy as np
from mindspore import nn

from mindpeft.data.batching import IGNORE_INDEX, BucketBatcher
from mindpeft.data.mindspore_source import encode_mindspore, features_from_mindspore, is_tokenised
from mindpeft.data.tokenization import Tokenizer
from mindpeft.errors import InputError

Batch = dict[str, np.ndarray]
_NOT_INPUTS = ("example_mask", "index")
_TEXT_COLUMNS = ("text", "sentence")


class Batches(Protocol):
    """What the trainer iterates over; :class:`mindpeft.data.batching.BucketBatcher` is one."""

    def set_epoch(self, epoch: int, skip_batches: int = 0) -> None: ...

    def __len__(self) -> int: ...

    def __iter__(self) -> Iterator[Batch]: ...


def make_batches(
    dataset: Any,
    batch_size: int,
    *,
    pad_token_id: int = 0,
    max_buckets: int = 4,
    max_length: int | None = None,
    shuffle: bool = False,
    seed: int = 0,
) -> Batches:
    """Batches of ``dataset``.

    Args:
        dataset: a batcher (returned as it is), a sequence of feature dicts (``input_ids``, ``labels``
            and so on), or a ``mindspore.dataset.Dataset`` with such columns, of rows or batches, which is
            read into memory.
        batch_size, pad_token_id, max_buckets, max_length, shuffle, seed: see ``BucketBatcher``.

    Raises:
        InputError: it is none of these, or its rows don't fit together.
    """
    if hasattr(dataset, "set_epoch") and hasattr(dataset, "__iter__"):
        return dataset
    if isinstance(dataset, mindspore.dataset.Dataset):
        dataset = features_from_mindspore(dataset)
    if not isinstance(dataset, Sequence) or not all(isinstance(row, dict) for row in dataset):
        raise InputError(
            f"a data set must be a list of feature dicts, a batcher or a mindspore.dataset.Dataset, "
            f"not {type(dataset).__name__}"
        )
    return BucketBatcher(
        dataset,
        batch_size,
        pad_token_id=pad_token_id,
        max_buckets=max_buckets,
        max_length=max_length,
        shuffle=shuffle,
        seed=seed,
    )


def tokenised(dataset: Any, tokenizer: Tokenizer | None, model: nn.Cell, max_length: int | None) -> Any:
    """A ``mindspore.dataset.Dataset`` of texts as features; any other data set as it is.

    Args:
        dataset: such a data set has a column ``text`` (or ``sentence``), and perhaps ``labels`` or ``label``.
        tokenizer: for those texts.
        model: its ``config`` names the labels (class numbers do as well) and the kind of problem.
        max_length: see ``encode``.

    Raises:
        InputError: there is no tokenizer or no column of texts, or a row does not fit the task.
    """
    if not isinstance(dataset, mindspore.dataset.Dataset) or is_tokenised(dataset):
        return dataset
    columns = dataset.get_col_names()
    text = next((name for name in _TEXT_COLUMNS if name in columns), None)
    if text is None:
        raise InputError(
            f"the data set has neither input_ids nor {' nor '.join(_TEXT_COLUMNS)}; "
            f"its columns are {', '.join(columns)}"
        )
    if tokenizer is None:
        raise InputError(
            f"the data set has texts ({text!r}): give the Trainer a tokenizer as processing_class"
        )
    config = getattr(model, "config", None)
    features, _ = encode_mindspore(
        dataset,
        tokenizer,
        text_column=text,
        task=getattr(config, "problem_type", None) or "single_label_classification",
        labels=list(config.id2label.values()) if hasattr(config, "id2label") else None,
        max_length=max_length,
    )
    return features


def model_inputs(batch: Batch, accepted: Collection[str]) -> Batch:
    """The model's columns, in order of name; rows that only fill up the batch don't count.

    Integer labels of such a row are -100, which losses leave out. Floats have no such value: there the model
    is given ``example_mask`` if it takes one, else the row is cut off (one more shape to compile, at most).

    Args:
        batch: as a batcher gives it.
        accepted: the names of the model's arguments.
    """
    inputs = {name: batch[name] for name in sorted(batch) if name not in _NOT_INPUTS}
    mask, labels = batch.get("example_mask"), inputs.get("labels")
    if mask is None or labels is None:
        return inputs
    if not np.issubdtype(labels.dtype, np.floating):
        counts = mask.reshape(-1, *[1] * (labels.ndim - 1)) > 0
        inputs["labels"] = np.where(counts, labels, IGNORE_INDEX).astype(labels.dtype)
        return inputs
    if "example_mask" in accepted:
        return inputs | {"example_mask": mask}
    return {name: column[mask > 0] for name, column in inputs.items()}


def real_rows(batch: Batch) -> np.ndarray:
    """Which rows of the batch are data, (batch,) bool."""
    mask = batch.get("example_mask")
    return np.ones(len(batch["input_ids"]), bool) if mask is None else mask > 0


def in_groups(batches: Batches, size: int) -> Iterator[list[Batch]]:
    """Micro-batches in groups of one optimizer step; the last group of an epoch may be smaller."""
    iterator = iter(batches)
    while group := list(islice(iterator, size)):
        yield group
