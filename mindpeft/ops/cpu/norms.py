"""Normalisation over the last axis."""

from __future__ import annotations

from mindspore import ops

from mindpeft.ops.cpu.library import Kernel, kernel, must_fit, rows_of, setting


def _normed(statistics: int):
    def shapes(x: list[int], weight: list[int], *_) -> tuple:
        must_fit(x, weight)
        return x, *((rows_of(x),) for _ in range(statistics))

    return shapes


class RmsNormKernel(Kernel):
    """``(y, scale)``: x (..., width), weight (width,); scale (rows,) is for the backward pass."""

    def __init__(self, eps: float):
        super().__init__()
        self.eps = setting(eps)
        backward = kernel("rms_norm_grad", lambda x, *_: x)
        backward_weight = kernel("rms_norm_grad_weight", lambda x, *_: (x[-1],))

        def gradients(x, weight, eps, out, dout):
            dx = backward(x, weight, out[1], dout[0])
            return dx, backward_weight(x, out[1], dout[0]), ops.zeros_like(eps)

        self.forward = kernel("rms_norm", _normed(1), 2, gradients)

    def construct(self, x, weight):
        return self.forward(x, weight, self.eps)


class LayerNormKernel(Kernel):
    """``(y, mean, scale)``: x (..., width), weight and bias (width,); the others (rows,)."""

    def __init__(self, eps: float):
        super().__init__()
        self.eps = setting(eps)
        backward = kernel("layer_norm_grad", lambda x, *_: x)
        backward_weight = kernel("layer_norm_grad_weight", lambda x, *_: (x[-1],))
        backward_bias = kernel("sum_rows", lambda x: (x[-1],))

        def gradients(x, weight, bias, eps, out, dout):
            dy = dout[0]
            dx = backward(x, weight, out[1], out[2], dy)
            return dx, backward_weight(x, out[1], out[2], dy), backward_bias(dy), ops.zeros_like(eps)

        self.forward = kernel("layer_norm", _normed(2), 3, gradients)

    def construct(self, x, weight, bias):
        return self.forward(x, weight, bias, self.eps)
