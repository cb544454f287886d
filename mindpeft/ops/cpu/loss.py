"""The loss of a projection to a vocabulary."""

from __future__ import annotations

from mindspore import ops

from mindpeft.ops.cpu.library import Kernel, kernel, must_fit


def _loss_and_gradient(hidden: list[int], weight: list[int], _) -> tuple:
    must_fit(hidden, weight)
    return (1,), hidden


class ProjectedLossKernel(Kernel):
    """``(loss, its gradient in hidden)``: hidden (rows, width), weight (vocabulary, width), labels (rows,).

    The mean cross-entropy of ``hidden @ weight.T`` over labels that are not negative, (1,). The gradient of
    hidden is worked out with the loss; that of a trained weight takes the logits a second time.
    """

    def __init__(self):
        super().__init__()
        of_weight = kernel("projected_cross_entropy_grad_weight", lambda _, weight, *__: weight)

        def gradients(hidden, weight, labels, out, dout):
            dloss = dout[0].reshape(())
            dweight = of_weight(hidden, weight, labels)
            return out[1] * dloss, (dweight * dloss).astype(weight.dtype), ops.zeros_like(labels)

        self.forward = kernel("projected_cross_entropy", _loss_and_gradient, 2, gradients)

    def construct(self, hidden, weight, labels):
        return self.forward(hidden, weight, labels)
