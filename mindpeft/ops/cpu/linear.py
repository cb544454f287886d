"""Dense products with a weight (out, in), and the same with LoRA's two matrices beside it."""

from __future__ import annotations

import mindspore as ms
from mindspore import ops

from mindpeft.ops.cpu.library import Kernel, kernel, must_fit, rows_of

WEIGHT_TYPES = (ms.float32, ms.bfloat16)


def _of_rows(x: list[int], weight: list[int], *_) -> tuple[int, ...]:
    must_fit(x, weight)
    return (*x[:-1], weight[0])


class LinearKernel(Kernel):
    """``x @ weight.T``: x (..., in) of float32, weight (out, in) of float32 or bfloat16."""

    def __init__(self):
        super().__init__()
        of_x, of_weight = _of_x(), _of_weight()

        def gradients(x, weight, out, dout):
            return of_x(dout, weight), of_weight(x, dout).astype(weight.dtype)

        self.forward = kernel("linear", _of_rows, gradients=gradients)

    def construct(self, x, weight):
        return self.forward(x, weight)


class LinearBiasKernel(Kernel):
    """``x @ weight.T + bias``, bias (out,) of float32."""

    def __init__(self):
        super().__init__()
        of_x, of_weight, of_bias = _of_x(), _of_weight(), _of_bias()

        def gradients(x, weight, bias, out, dout):
            return of_x(dout, weight), of_weight(x, dout).astype(weight.dtype), of_bias(dout)

        self.forward = kernel("linear_bias", _of_rows, gradients=gradients)

    def construct(self, x, weight, bias):
        return self.forward(x, weight, bias)


# What the inputs of a product get; a graph in which the weight or the bias is frozen holds nothing of it.
def _of_x() -> ops.Custom:
    return kernel("linear_grad", lambda dy, weight: (*dy[:-1], weight[1]))


def _of_weight() -> ops.Custom:
    return kernel("linear_grad_weight", lambda x, dy: (dy[-1], x[-1]))


def _of_bias() -> ops.Custom:
    return kernel("sum_rows", lambda x: (x[-1],))


def _with_hidden(x: list[int], weight: list[int], a: list[int], *_) -> tuple[tuple[int, ...], ...]:
    must_fit(x, weight)
    must_fit(x, a)
    return (*x[:-1], weight[0]), (rows_of(x), a[0])


def _lora_gradients() -> ops.Custom:
    return kernel("lora_linear_grad", lambda x, weight, a, b, *_: (x, a, b), 3)


class LoraKernel(Kernel):
    """``(x @ weight.T + hidden @ b.T, hidden)`` with ``hidden = scale * x @ a.T``.

    x (..., in), weight (out, in), a (r, in), b (out, r), scale one number; noise of
    `mindpeft.ops.cpu.dropout.Noise` for a dropout of the x before ``a.T``. Both get no gradient.
    """

    def __init__(self):
        super().__init__()
        backward, of_weight = _lora_gradients(), _of_weight()

        def gradients(x, weight, a, b, scale, noise, out, dout):
            dx, da, db = backward(x, weight, a, b, scale, noise, out[1], dout[0])
            dweight = of_weight(x, dout[0]).astype(weight.dtype)
            return dx, dweight, da, db, ops.zeros_like(scale), ops.zeros_like(noise)

        self.forward = kernel("lora_linear", _with_hidden, 2, gradients)

    def construct(self, x, weight, a, b, scale, noise):
        return self.forward(x, weight, a, b, scale, noise)


class LoraBiasKernel(Kernel):
    """The same with a bias (out,) of the layer itself."""

    def __init__(self):
        super().__init__()
        backward, of_weight, of_bias = _lora_gradients(), _of_weight(), _of_bias()

        def gradients(x, weight, a, b, scale, noise, bias, out, dout):
            dy = dout[0]
            dx, da, db = backward(x, weight, a, b, scale, noise, out[1], dy)
            dweight, dbias = of_weight(x, dy).astype(weight.dtype), of_bias(dy)
            return dx, dweight, da, db, ops.zeros_like(scale), ops.zeros_like(noise), dbias

        self.forward = kernel("lora_linear_bias", _with_hidden, 2, gradients)

    def construct(self, x, weight, a, b, scale, noise, bias):
        return self.forward(x, weight, a, b, scale, noise, bias)
