from __future__ import annotations

import math

import numpy as np
import pytest
from scipy.stats import pearsonr, spearmanr

from mindpeft.errors import InputError
from mindpeft.train.metrics import (
    EvalPrediction,
    multi_label,
    perplexity,
    pick_metric,
    problem_of,
    regression,
    single_label,
    token,
)


def test_single_label_by_hand():
    logits = np.eye(3)[[0, 1, 2, 2]]  # the last of four is wrong
    metrics = single_label(EvalPrediction(logits, np.array([0, 1, 2, 1])))
    assert metrics["accuracy"] == metrics["f1_micro"] == 0.75
    assert metrics["f1_macro"] == pytest.approx((1 + 2 / 3 + 2 / 3) / 3)
    # covariances: (4 * 3 - (1 + 2 + 2)) / sqrt((16 - 6) * (16 - 6))
    assert metrics["matthews"] == pytest.approx(7 / 10)


def test_multi_label_by_hand():
    logits = np.array([[1.0, -1.0], [1.0, 1.0]])
    metrics = multi_label(EvalPrediction(logits, np.array([[1.0, 0.0], [0.0, 1.0]], np.float32)))
    assert metrics["accuracy"] == 0.5
    assert metrics["f1_micro"] == pytest.approx(2 * 2 / (2 * 2 + 1))
    assert metrics["f1_macro"] == pytest.approx((2 / 3 + 1) / 2)


def test_regression_equals_scipy_and_survives_a_constant():
    rng = np.random.default_rng(0)
    value, truth = rng.standard_normal((20, 1)), rng.standard_normal(20)
    metrics = regression(EvalPrediction(value, truth))
    assert metrics["pearson"] == pytest.approx(pearsonr(value[:, 0], truth)[0])
    assert metrics["spearman"] == pytest.approx(spearmanr(value[:, 0], truth)[0])
    assert set(regression(EvalPrediction(np.zeros((20, 1)), truth))) == {"mse"}


def test_token_leaves_ignored_ones_out():
    chosen, labels = np.array([[1, 2, 0]]), np.array([[1, 1, -100]])
    assert token(EvalPrediction(chosen, labels))["accuracy"] == 0.5
    assert token(EvalPrediction(np.eye(3)[chosen], labels))["accuracy"] == 0.5


def test_perplexity():
    assert perplexity(math.log(7)) == pytest.approx(7)
    assert perplexity(1e4) == math.inf


def test_problem_is_told_by_labels():
    whole, real = np.zeros(4, np.int32), np.zeros(4, np.float32)
    assert problem_of((4, 3), whole) == "single_label"
    assert problem_of((4, 1), real) == "regression"
    assert problem_of((4, 3), np.zeros((4, 3), np.float32)) == "multi_label"
    assert problem_of((4, 6, 3), np.zeros((4, 6), np.int32)) == "token"
    assert problem_of((4, 6, 2), np.zeros((4, 2), np.int32)) is None


def test_unknown_metric_names_the_nearest():
    metrics = {"eval_loss": 1.0, "eval_accuracy": 0.5}
    assert pick_metric(metrics, "accuracy") == pick_metric(metrics, "eval_accuracy") == 0.5
    with pytest.raises(InputError, match="did you mean 'accuracy'"):
        pick_metric(metrics, "acuracy")
