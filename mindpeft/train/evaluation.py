"""One pass over a data set without training: predictions, mean loss and metrics."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
from mindspore import nn

from mindpeft.data.batching import IGNORE_INDEX
from mindpeft.train.batches import Batch, Batches, real_rows
from mindpeft.train.metrics import METRICS, EvalPrediction, Metrics, perplexity, problem_of
from mindpeft.train.runner import StepRunner

ComputeMetrics = Callable[[EvalPrediction], Metrics]
_LANGUAGE_HEADS = ("ForCausalLM", "LMHeadModel", "ForMaskedLM", "ForConditionalGeneration")


class PredictionOutput(NamedTuple):
    """What ``Trainer.predict`` gives: logits and labels in the data set's order, and metrics."""

    predictions: np.ndarray | None
    label_ids: np.ndarray | None
    metrics: Metrics


@dataclass
class _Collected:
    """What a pass gathers, batch by batch; labels and logits of real rows alone."""

    logits: list[np.ndarray] = field(default_factory=list)
    labels: list[np.ndarray] = field(default_factory=list)
    order: list[np.ndarray] = field(default_factory=list)
    loss: float = 0.0
    weight: float = 0.0
    rows: int = 0
    problem: str | None = None


def evaluate(
    model: nn.Cell,
    runner: StepRunner,
    batches: Batches,
    *,
    compute_metrics: ComputeMetrics | None = None,
    loss_only: bool = False,
    keep_logits: bool = False,
    prefix: str = "eval",
) -> PredictionOutput:
    """Run the model over ``batches``.

    Args:
        compute_metrics: gets logits and labels; by default the metrics that fit the labels, and perplexity
            for language models, whose logits are not kept.
        loss_only: no logits, no metrics but the loss.
        keep_logits: return logits even where the metrics don't need them.
        prefix: put before each metric's name.
    """
    start = time.perf_counter()
    speaks = is_language_model(model)
    loss_only = loss_only or (speaks and compute_metrics is None and not keep_logits)
    whole_logits = compute_metrics is not None or keep_logits
    found = _Collected()
    batches.set_epoch(0)
    for batch in batches:
        _collect(found, runner, batch, loss_only, whole_logits, shift=_is_causal(model))
    predictions, labels = _joined(found.logits, found.order), _joined(found.labels, found.order)
    metrics: Metrics = {}
    if found.weight:
        metrics["loss"] = found.loss / found.weight
        if speaks:
            metrics["perplexity"] = perplexity(metrics["loss"])
    if predictions is not None and labels is not None:
        metrics |= _metrics(compute_metrics, found.problem, EvalPrediction(predictions, labels))
    seconds = time.perf_counter() - start
    metrics |= {"runtime": round(seconds, 3), "samples_per_second": round(found.rows / seconds, 1)}
    named = {name if name.startswith(f"{prefix}_") else f"{prefix}_{name}": v for name, v in metrics.items()}
    return PredictionOutput(predictions, labels, named)


def _collect(
    found: _Collected, runner: StepRunner, batch: Batch, loss_only: bool, whole_logits: bool, shift: bool
) -> None:
    rows = real_rows(batch)
    loss, logits = runner.evaluate(batch, loss_only and "labels" in batch)
    labels = batch["labels"][rows] if "labels" in batch else None
    if loss is not None:
        weight = _loss_weight(labels, batch["input_ids"].shape, shift)
        if weight:  # a batch without a label has no loss (0/0)
            found.loss, found.weight = found.loss + loss * weight, found.weight + weight
        found.problem = None if loss_only else problem_of(logits.shape, batch["labels"])
    if not loss_only:
        logits = logits[rows] if len(logits) == len(rows) else logits
        reduces = found.problem == "token" and not whole_logits
        found.logits.append(logits.argmax(-1) if reduces else logits)
        if labels is not None:
            found.labels.append(labels)
    found.order.append(batch["index"][rows] if "index" in batch else found.rows + np.arange(rows.sum()))
    found.rows += int(rows.sum())


def _loss_weight(labels: np.ndarray, ids_shape: tuple[int, ...], shift: bool) -> int:
    """What the batch's mean loss is a mean over: labelled tokens in token tasks, else rows."""
    if labels.ndim == 2 and labels.shape[1] == ids_shape[1] and np.issubdtype(labels.dtype, np.integer):
        return int((labels[:, int(shift) :] != IGNORE_INDEX).sum())
    return len(labels)


def _metrics(compute: ComputeMetrics | None, problem: str | None, prediction: EvalPrediction) -> Metrics:
    if compute is not None:
        return {name: float(value) for name, value in compute(prediction).items()}
    return METRICS[problem](prediction) if problem is not None else {}


def _joined(parts: list[np.ndarray], order: list[np.ndarray]) -> np.ndarray | None:
    """Concatenate batches, sequences padded with -100 to the longest, in the data set's order."""
    if not parts:
        return None
    if parts[0].ndim > 1:
        length = max(part.shape[1] for part in parts)
        parts = [_padded(part, length) for part in parts]
    return np.concatenate(parts)[np.argsort(np.concatenate(order), kind="stable")]


def _padded(part: np.ndarray, length: int) -> np.ndarray:
    widths = [(0, 0), (0, length - part.shape[1]), *[(0, 0)] * (part.ndim - 2)]
    return np.pad(part, widths, constant_values=IGNORE_INDEX)


def is_language_model(model: nn.Cell) -> bool:
    """Whether the model's loss is a mean over tokens of text, by the Hugging Face name of its class."""
    return _base_name(model).endswith(_LANGUAGE_HEADS)


def _is_causal(model: nn.Cell) -> bool:
    return _base_name(model).endswith(("ForCausalLM", "LMHeadModel"))


def _base_name(model: nn.Cell) -> str:
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    return type(base).__name__
