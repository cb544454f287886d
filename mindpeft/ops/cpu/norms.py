"""Normalisation over the last axis."""

from __future__ import annotations

from mindspore import ops

from mindpeft.ops.cpu.library import Kernel, kernel, must_fit, rows_of, setting


def _normed(statistics: int, less: bool):
    def shapes(x: list[int], weight: list[int], *_) -> tuple:
        must_fit(x, weight)
        return x, *((rows_of(x),) for _ in range(statistics)), *([x] if less else [])

    return shapes


class RmsNormKernel(Kernel):
    """``(y, scale)``: x (..., width), weight (width,); scale (rows,) is for the backward pass.

    Args:
        less: keep x for the backward pass in bfloat16, as one more output.
    """

    def __init__(self, eps: float, less: bool = False):
        super().__init__()
        self.epsilon, self.eps, self.less = eps, setting(eps), less
        backward = kernel("rms_norm_grad", lambda x, *_: x)
        backward_weight = kernel("rms_norm_grad_weight", lambda x, *_: (x[-1],))

        def gradients(x, weight, eps, out, dout):
            kept = out[2] if less else x
            dx = backward(kept, weight, out[1], dout[0])
            return dx, backward_weight(kept, out[1], dout[0]), ops.zeros_like(eps)

        self.forward = kernel("rms_norm", _normed(1, less), 2, gradients, int(less))

    def construct(self, x, weight):
        return self.forward(x, weight, self.eps)

    def keeping_less(self) -> RmsNormKernel:
        return RmsNormKernel(self.epsilon, less=True)


class LayerNormKernel(Kernel):
    """``(y, mean, scale)``: x (..., width), weight and bias (width,); the others (rows,).

    Args:
        less: keep x for the backward pass in bfloat16, as one more output.
    """

    def __init__(self, eps: float, less: bool = False):
        super().__init__()
        self.epsilon, self.eps, self.less = eps, setting(eps), less
        backward = kernel("layer_norm_grad", lambda x, *_: x)
        backward_weight = kernel("layer_norm_grad_weight", lambda x, *_: (x[-1],))
        backward_bias = kernel("sum_rows", lambda x: (x[-1],))

        def gradients(x, weight, bias, eps, out, dout):
            dy, kept = dout[0], out[3] if less else x
            dx = backward(kept, weight, out[1], out[2], dy)
            return dx, backward_weight(kept, out[1], out[2], dy), backward_bias(dy), ops.zeros_like(eps)

        self.forward = kernel("layer_norm", _normed(2, less), 3, gradients, int(less))

    def construct(self, x, weight, bias):
        return self.forward(x, weight, bias, self.eps)

    def keeping_less(self) -> LayerNormKernel:
        return LayerNormKernel(self.epsilon, less=True)
