"""The loss of a projection to a vocabulary."""

from __future__ import annotations

from mindspore import ops

from mindpeft.ops.cpu.library import Kernel, kernel


class ProjectedLossKernel(Kernel):
    """``(loss, its gradient in hidden)``: hidden (rows, width), weight (vocabulary, width), labels (rows,).

    The mean cross-entropy of ``hidden @ weight.T`` over labels that are not negative, (1,). The gradient of
    hidden is worked out with the loss; that of a trained weight takes the logits a second time.
    """

    def __init__(self):
        super().__init__()
        self.forward = kernel("projected_cross_entropy", lambda hidden, *_: ((1,), hidden), 2)
        self.weight_gradient = kernel("projected_cross_entropy_grad_weight", lambda _, weight, *__: weight)

    def construct(self, hidden, weight, labels):
        return self.forward(hidden, weight, labels)

    def bprop(self, hidden, weight, labels, out, dout):
        dloss = dout[0].reshape(())
        dweight = self.weight_gradient(hidden, weight, labels)
        return out[1] * dloss, (dweight * dloss).astype(weight.dtype), ops.zeros_like(labels)
