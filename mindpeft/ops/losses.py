"""The losses of the task heads."""

from __future__ import annotations

import mindspore as ms
import mindspore.nn as nn
from mindspore import Tensor, ops

from mindpeft.ops.cpu import kernels_on
from mindpeft.ops.cpu.linear import WEIGHT_TYPES
from mindpeft.ops.cpu.loss import ProjectedLossKernel

IGNORED_LABEL = -100


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean cross-entropy over the labels that are not -100 (0 where there is none).

    Args:
        logits: (..., classes).
        labels: (...), integers.

    Returns:
        Scalar of dtype float32.
    """
    rows = logits.reshape((-1, logits.shape[-1])).astype(ms.float32)
    labels = labels.reshape((-1,)).astype(ms.int32)
    counted = (labels != IGNORED_LABEL).astype(ms.float32)
    log_probabilities = ops.log_softmax(rows, -1)
    chosen = ops.gather_elements(log_probabilities, 1, ops.maximum(labels, 0).reshape((-1, 1))).reshape((-1,))
    return -(chosen * counted).sum() / ops.maximum(counted.sum(), 1.0)


def causal_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean cross-entropy of each token given those before it.

    Args:
        logits: (batch, length, vocabulary).
        labels: (batch, length), the tokens themselves; -100 leaves one out.
    """
    return cross_entropy(logits, next_labels(labels))


def next_labels(labels: Tensor) -> Tensor:
    """What comes behind each token, (batch, length); -100 behind the last."""
    none = ops.full((labels.shape[0], 1), IGNORED_LABEL, dtype=labels.dtype)
    return ops.concat((labels[:, 1:], none), 1)


class ProjectedCrossEntropy(nn.Cell):
    """Mean cross-entropy of ``hidden @ weight.T``, whose logits are never all in memory.

    The gradient of the hidden states is worked out with the loss, some rows at a time: it is
    ``softmax(logits) @ weight - weight[label]`` for each. That of the weight takes the logits a second time;
    a graph in which the weight is frozen does not hold it.

    Args:
        rows: how many rows of logits there are at once.
    """

    def __init__(self, rows: int = 256):
        super().__init__()
        self.kernel = ProjectedLossKernel() if kernels_on() else None
        self.parts = _LossAndGradient(rows)

    def construct(self, hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
        """
        Args:
            hidden: (..., width).
            weight: (vocabulary, width).
            labels: (...), integers; -100 leaves one out.

        Returns:
            Scalar of dtype float32.
        """
        rows = hidden.reshape((-1, hidden.shape[-1]))
        labels = labels.reshape((-1,)).astype(ms.int32)
        if self.kernel is not None and rows.dtype == ms.float32 and weight.dtype in WEIGHT_TYPES:
            return self.kernel(rows, weight, labels)[0].reshape(())
        return self.parts(rows, weight.astype(rows.dtype), labels)[0]


class _LossAndGradient(nn.Cell):
    """``(loss, gradient of the hidden states)``, hidden (n, width), labels (n,)."""

    def __init__(self, rows: int):
        super().__init__()
        self.rows = rows
        self.project = ops.MatMul(transpose_b=True)
        self.mix = ops.MatMul()
        self.outer = ops.MatMul(transpose_a=True)
        self.softmax = ops.Softmax(-1)
        self.largest = ops.ReduceMax()
        self.concat = ops.Concat(0)
        self.tile = ops.Tile()
        self.one_hot = ops.OneHot()

    def weights(self, labels):
        """What each row counts in the mean, (n,)."""
        counted = (labels != IGNORED_LABEL).astype(ms.float32)
        return counted * ops.reciprocal(ops.maximum(counted.sum(), 1.0))

    def construct(self, hidden, weight, labels):
        shares, loss, gradients = self.weights(labels), 0.0, ()
        for start in range(0, hidden.shape[0], self.rows):
            some, wanted = hidden[start : start + self.rows], labels[start : start + self.rows]
            logits = self.project(some, weight)
            shared = self.softmax(logits.astype(ms.float32))
            own = ops.gather(weight, ops.maximum(wanted, 0), 0)
            # log sum exp = max - log(largest share), which can't underflow
            top = self.largest(logits, 1).astype(ms.float32) - ops.log(self.largest(shared, 1))
            chosen = (some.astype(ms.float32) * own.astype(ms.float32)).sum(1)
            share = shares[start : start + self.rows]
            loss = loss + ((top - chosen) * share).sum()
            change = self.mix(shared.astype(weight.dtype), weight) - own
            scale = self.tile(share.reshape((-1, 1)), (1, hidden.shape[1]))
            gradients = (*gradients, change * scale.astype(change.dtype))
        return loss, self.concat(gradients)

    def bprop(self, hidden, weight, labels, out, dout):
        shares, change = self.weights(labels), ops.zeros_like(weight)
        for start in range(0, hidden.shape[0], self.rows):
            some, wanted = hidden[start : start + self.rows], labels[start : start + self.rows]
            scale = self.tile(shares[start : start + self.rows].reshape((-1, 1)), (1, hidden.shape[1]))
            scaled = some * scale.astype(some.dtype)
            shared = self.softmax(self.project(some, weight).astype(ms.float32))
            # Not index_add: an operator that writes in place keeps all this in graphs that don't want it.
            one, none = Tensor(1.0, ms.float32), Tensor(0.0, ms.float32)
            shared = shared - self.one_hot(wanted, weight.shape[0], one, none)
            change = change + self.outer(shared.astype(weight.dtype), scaled)
        return (
            out[1] * dout[0].astype(out[1].dtype),
            change * dout[0].astype(change.dtype),
            ops.zeros_like(labels),
        )


def span_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean of the cross-entropies of a span's first and last position.

    Args:
        logits: (batch, length, 2).
        labels: (batch, 2) integers; a position that is negative or not below length is left out.
    """
    inside = ops.logical_and(labels >= 0, labels < logits.shape[1])
    labels = ops.where(inside, labels, ops.full_like(labels, IGNORED_LABEL))
    first = cross_entropy(logits[:, :, 0], labels[:, 0])
    return (first + cross_entropy(logits[:, :, 1], labels[:, 1])) * 0.5


def classification_loss(
    logits: Tensor, labels: Tensor, problem_type: str | None = None, example_mask: Tensor | None = None
) -> Tensor:
    """The loss of a whole-text head, chosen as Hugging Face chooses it.

    Args:
        logits: (batch, num_labels).
        labels: (batch,) integers, or floats of the logits' shape ((batch,) too for one label).
        problem_type: ``regression``, ``single_label_classification``, ``multi_label_classification``; None
            means regression for one label, single-label for integer labels and multi-label for floats.
        example_mask: (batch,), 1 for the rows that count, where the labels are floats.
    """
    if problem_type is None:
        integers = labels.dtype in (ms.int32, ms.int64)
        multiple = "single_label_classification" if integers else "multi_label_classification"
        problem_type = "regression" if logits.shape[-1] == 1 else multiple
    if problem_type == "single_label_classification":
        return cross_entropy(logits, labels)
    labels = labels.reshape(logits.shape)
    if problem_type == "regression":
        return mean_squared_error(logits, labels, example_mask)
    return binary_cross_entropy(logits, labels, example_mask)


def mean_squared_error(predictions: Tensor, targets: Tensor, example_mask: Tensor | None = None) -> Tensor:
    """Mean of ``(predictions - targets)**2``; both of one shape, the first axis is the batch."""
    difference = predictions.astype(ms.float32) - targets.astype(ms.float32)
    return weighted_mean(ops.square(difference), example_mask)


def binary_cross_entropy(logits: Tensor, targets: Tensor, example_mask: Tensor | None = None) -> Tensor:
    """Mean of the per-label binary cross-entropy; logits and targets (batch, labels), targets in [0, 1]."""
    x, y = logits.astype(ms.float32), targets.astype(ms.float32)
    # max(x, 0) - x y + log(1 + exp(-|x|)) overflows for no x
    return weighted_mean(ops.relu(x) - x * y + ops.log(1.0 + ops.exp(-ops.abs(x))), example_mask)


def weighted_mean(values: Tensor, example_mask: Tensor | None) -> Tensor:
    """Mean over all elements of the rows (first axis) that ``example_mask`` (batch,) marks with 1."""
    rows = values.reshape((values.shape[0], -1))
    if example_mask is None:
        return rows.mean()
    per_row = rows.mean(-1)
    return (per_row * example_mask).sum() / ops.maximum(example_mask.sum(), 1.0)
