"""What an evaluation measures, by scikit-learn and SciPy."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from mindpeft.data.batching import IGNORE_INDEX
from mindpeft.errors import InputError, did_you_mean

Metrics = dict[str, float]


class EvalPrediction(NamedTuple):
    """What a ``compute_metrics`` function gets.

    Attributes:
        predictions: logits, rows in the order of the data set; rows of different length are filled with -100.
            With the default metrics of token tasks, (rows, length) predicted ids instead.
        label_ids: labels in the same order, -100 where there is none.
    """

    predictions: np.ndarray
    label_ids: np.ndarray


def single_label(prediction: EvalPrediction) -> Metrics:
    """Accuracy, macro and micro F1, and Matthews correlation; logits (rows, classes), labels (rows,)."""
    from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef

    chosen, truth = prediction.predictions.argmax(-1), prediction.label_ids
    return {
        "accuracy": float(accuracy_score(truth, chosen)),
        "f1_macro": float(f1_score(truth, chosen, average="macro", zero_division=0)),
        "f1_micro": float(f1_score(truth, chosen, average="micro", zero_division=0)),
        "matthews": float(matthews_corrcoef(truth, chosen)),
    }


def multi_label(prediction: EvalPrediction) -> Metrics:
    """Macro and micro F1 and the share of rows wholly right; logits and 0/1 labels (rows, classes)."""
    from sklearn.metrics import accuracy_score, f1_score

    chosen, truth = (prediction.predictions > 0).astype(int), prediction.label_ids.astype(int)
    return {
        "accuracy": float(accuracy_score(truth, chosen)),
        "f1_macro": float(f1_score(truth, chosen, average="macro", zero_division=0)),
        "f1_micro": float(f1_score(truth, chosen, average="micro", zero_division=0)),
    }


def regression(prediction: EvalPrediction) -> Metrics:
    """Pearson and Spearman correlation and mean squared error; predictions (rows,) or (rows, 1)."""
    from scipy.stats import pearsonr, spearmanr

    value = prediction.predictions.reshape(-1).astype(np.float64)
    truth = prediction.label_ids.reshape(-1).astype(np.float64)
    metrics = {"mse": float(np.mean((value - truth) ** 2))}
    if (
        len(value) > 1 and np.ptp(value) > 0 and np.ptp(truth) > 0
    ):  # a correlation with a constant is undefined
        metrics["pearson"] = float(pearsonr(value, truth).statistic)
        metrics["spearman"] = float(spearmanr(value, truth).statistic)
    return metrics


def token(prediction: EvalPrediction) -> Metrics:
    """Accuracy and macro F1 over labelled tokens; predicted ids or logits, labels (rows, length)."""
    from sklearn.metrics import accuracy_score, f1_score

    chosen = prediction.predictions.argmax(-1) if prediction.predictions.ndim == 3 else prediction.predictions
    counted = prediction.label_ids != IGNORE_INDEX
    chosen, truth = chosen[counted], prediction.label_ids[counted]
    return {
        "accuracy": float(accuracy_score(truth, chosen)),
        "f1_macro": float(f1_score(truth, chosen, average="macro", zero_division=0)),
    }


def perplexity(mean_token_loss: float) -> float:
    """e to the mean loss per token; infinite where that overflows."""
    return math.exp(mean_token_loss) if mean_token_loss < 700 else math.inf


METRICS: dict[str, Callable[[EvalPrediction], Metrics]] = {
    "single_label": single_label,
    "multi_label": multi_label,
    "regression": regression,
    "token": token,
}


def problem_of(logits_shape: tuple[int, ...], labels: np.ndarray) -> str | None:
    """The key of ``METRICS`` that fits a batch, by the labels' kind and the shapes; None if none does.

    One whole number a row is single_label; floats are multi_label, or regression if there is one a row; one
    whole number a token is token.
    """
    if np.issubdtype(labels.dtype, np.floating):
        return "multi_label" if labels.ndim == 2 and labels.shape[1] > 1 else "regression"
    if labels.ndim == 1 and len(logits_shape) == 2:
        return "single_label"
    if labels.ndim == 2 and len(logits_shape) == 3 and tuple(labels.shape) == tuple(logits_shape[:2]):
        return "token"
    return None


def pick_metric(metrics: Metrics, name: str) -> float:
    """The value of ``metric_for_best_model``, given with or without ``eval_``.

    Raises:
        InputError: the evaluation gave no such metric.
    """
    key = name if name.startswith("eval_") else f"eval_{name}"
    if key not in metrics:
        names = [metric.removeprefix("eval_") for metric in metrics]
        raise InputError(
            f"metric_for_best_model {name!r} was not evaluated; there are {', '.join(names)}"
            f"{did_you_mean(name, names)}"
        )
    return metrics[key]
