"""Losses against torch: values and gradients, large logits, rows left out."""

# ruff: noqa: E731  (a graph takes a lambda from a line of its own)

from __future__ import annotations

import mindspore as ms
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from mindspore import Tensor

from mindpeft.ops.losses import (
    ProjectedCrossEntropy,
    binary_cross_entropy,
    causal_loss,
    classification_loss,
    cross_entropy,
    mean_squared_error,
)
from tests.ops.compare import assert_close, run, run_torch

RNG = np.random.default_rng(8)
SCALES = [1.0, 200.0]


def logits(*shape, scale=1.0):
    return RNG.normal(0, scale, shape).astype(np.float32)


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("shape", [(1, 2), (7, 5), (3, 5, 11)])
def test_cross_entropy(shape, scale):
    labels = RNG.integers(0, shape[-1], shape[:-1])
    labels.flat[1::3] = -100
    x = logits(*shape, scale=scale)
    ours = lambda t: cross_entropy(t, Tensor(labels))
    found = run(ours, x)
    theirs = lambda t: F.cross_entropy(t.flatten(0, -2), torch.tensor(labels).flatten())
    assert_close(found, run_torch(theirs, x), 5e-6)  # the CPU's log_softmax is good to 3e-6


def test_cross_entropy_without_any_label_is_zero():
    x = logits(3, 4)
    ours = lambda t: cross_entropy(t, Tensor(np.full(3, -100)))
    value, gradient = run(ours, x)
    assert value == 0
    assert not gradient.any()


def test_cross_entropy_in_float16_is_reckoned_in_float32():
    x = logits(6, 9).astype(np.float16)
    labels = RNG.integers(0, 9, 6)
    loss = cross_entropy(Tensor(x), Tensor(labels))
    assert loss.dtype == ms.float32
    assert float(loss) == pytest.approx(
        float(F.cross_entropy(torch.tensor(x).float(), torch.tensor(labels))), rel=1e-5
    )


@pytest.mark.parametrize("scale", SCALES)
def test_binary_cross_entropy(scale):
    x, targets = logits(5, 3, scale=scale), RNG.random((5, 3)).astype(np.float32)
    wanted = torch.tensor(targets, dtype=torch.float64)
    ours = lambda t: binary_cross_entropy(t, Tensor(targets))
    found = run(ours, x)
    assert_close(found, run_torch(lambda t: F.binary_cross_entropy_with_logits(t, wanted), x), 2e-6)


def test_mean_squared_error():
    x, targets = logits(5, 3), logits(5, 3)
    wanted = torch.tensor(targets, dtype=torch.float64)
    ours = lambda t: mean_squared_error(t, Tensor(targets))
    found = run(ours, x)
    assert_close(found, run_torch(lambda t: F.mse_loss(t, wanted), x), 2e-6)


@pytest.mark.parametrize("loss", [mean_squared_error, binary_cross_entropy])
def test_rows_left_out(loss):
    x, targets = logits(6, 2), RNG.random((6, 2)).astype(np.float32)
    kept = np.array([1, 1, 0, 1, 0, 0], np.float32)
    of_some = lambda t: loss(t, Tensor(targets), Tensor(kept))
    of_those = lambda t: loss(t, Tensor(targets[kept == 1]))
    some, gradient = run(of_some, x)
    alone, _ = run(of_those, x[kept == 1])
    np.testing.assert_allclose(some, alone, rtol=1e-6)
    assert not gradient[kept == 0].any()
    assert float(loss(Tensor(x), Tensor(targets), Tensor(np.zeros(6, np.float32)))) == 0


CHOICES = [
    (None, 1, np.float32, "mse"),
    (None, 4, np.int32, "ce"),
    (None, 4, np.int64, "ce"),
    (None, 4, np.float32, "bce"),
    ("regression", 4, np.float32, "mse"),
    ("single_label_classification", 4, np.int32, "ce"),
    ("multi_label_classification", 4, np.float32, "bce"),
]


@pytest.mark.parametrize(("problem_type", "count", "kind", "expected"), CHOICES)
def test_the_loss_is_chosen_as_hugging_face_chooses(problem_type, count, kind, expected):
    x = logits(6, count)
    if kind == np.float32:
        labels = RNG.integers(0, 2, (6, count) if count > 1 else 6).astype(kind)
    else:
        labels = RNG.integers(0, count, 6).astype(kind)
    loss = float(classification_loss(Tensor(x), Tensor(labels), problem_type))
    t, y = torch.tensor(x), torch.tensor(labels)
    wanted = {
        "mse": lambda: F.mse_loss(t, y.reshape(t.shape)),
        "ce": lambda: F.cross_entropy(t, y.long()),
        "bce": lambda: F.binary_cross_entropy_with_logits(t, y),
    }[expected]()
    assert loss == pytest.approx(float(wanted), rel=1e-5)


@pytest.mark.parametrize("rows", [1, 4, 7, 100])
def test_projected_cross_entropy(rows):
    """Of logits that are never all there: the value, and the gradients of hidden states and weight."""
    hidden, weight = (RNG.normal(0, 2, shape).astype(np.float32) for shape in ((2, 7, 12), (19, 12)))
    labels = RNG.integers(0, 19, (2, 7)).astype(np.int32)
    labels[0, :3] = -100
    loss = ProjectedCrossEntropy(rows)
    ours = lambda h, w: loss(h, w, Tensor(labels)).reshape((1,))
    found = run(ours, hidden, weight)

    def plain(h, w):
        return F.cross_entropy((h @ w.T).flatten(0, 1), torch.tensor(labels).flatten().long()).reshape(1)

    assert_close(found, run_torch(plain, hidden, weight), 1e-5)


def test_projected_cross_entropy_of_large_logits_and_of_nothing():
    hidden, weight = RNG.normal(0, 60, (5, 4)).astype(np.float32), RNG.normal(size=(9, 4)).astype(np.float32)
    labels = RNG.integers(0, 9, 5).astype(np.int32)
    loss = ProjectedCrossEntropy(2)
    found = float(loss(Tensor(hidden), Tensor(weight), Tensor(labels)))
    expected = F.cross_entropy(
        torch.tensor(hidden).double() @ torch.tensor(weight).double().T, torch.tensor(labels).long()
    )
    assert found == pytest.approx(float(expected), rel=1e-5)
    assert float(loss(Tensor(hidden), Tensor(weight), Tensor(np.full(5, -100, np.int32)))) == 0


def test_causal_loss_is_of_the_next_token():
    x, labels = RNG.normal(size=(2, 6, 9)).astype(np.float32), RNG.integers(0, 9, (2, 6)).astype(np.int32)
    labels[1, 4:] = -100
    wanted = F.cross_entropy(
        torch.tensor(x)[:, :-1].flatten(0, 1), torch.tensor(labels)[:, 1:].flatten().long()
    )
    assert float(causal_loss(Tensor(x), Tensor(labels))) == pytest.approx(float(wanted), rel=1e-5)
