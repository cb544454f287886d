"""From any data set a user may hold to batches, and from a batch to the model's inputs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import mindspore.dataset
import numpy as np

from mindpeft.data.batching import BucketBatcher
from mindpeft.errors import InputError

Batch = dict[str, np.ndarray]
_NOT_INPUTS = ("example_mask", "index")


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
        dataset = _rows(dataset)
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


def _rows(dataset: mindspore.dataset.Dataset) -> list[dict[str, Any]]:
    """All rows of a MindSpore data set; batches are taken apart, to be shuffled and bucketed."""
    rows: list[dict[str, Any]] = []
    for item in dataset.create_dict_iterator(num_epochs=1, output_numpy=True):
        if "input_ids" in item and item["input_ids"].ndim == 2:
            count = len(item["input_ids"])
            rows += [{name: _plain(column[i]) for name, column in item.items()} for i in range(count)]
        else:
            rows.append({name: _plain(column) for name, column in item.items()})
    return rows


def _plain(value: np.ndarray) -> Any:
    """A scalar column (of shape () or (1,)) as a Python number."""
    return value.reshape(-1)[0].item() if value.size == 1 and value.ndim <= 1 else value


def model_inputs(batch: Batch) -> Batch:
    """The model's columns, in order of name; rows that only fill up the batch don't count.

    Integer labels of such a row are -100, which losses leave out. Floats have no such value, so the row
    itself is cut off (one more shape to compile, at most).
    """
    inputs = {name: batch[name] for name in sorted(batch) if name not in _NOT_INPUTS}
    mask = batch.get("example_mask")
    labels = inputs.get("labels")
    if mask is None or labels is None or mask.all():
        return inputs
    if np.issubdtype(labels.dtype, np.floating):
        return {name: column[mask > 0] for name, column in inputs.items()}
    row_mask = mask.reshape(-1, *[1] * (labels.ndim - 1))
    inputs["labels"] = np.where(row_mask > 0, labels, -100).astype(labels.dtype)
    return inputs


def real_rows(batch: Batch) -> np.ndarray:
    """Which rows of the batch are data, (batch,) bool."""
    mask = batch.get("example_mask")
    return np.ones(len(batch["input_ids"]), bool) if mask is None else mask > 0
