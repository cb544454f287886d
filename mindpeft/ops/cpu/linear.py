"""Dense products with a weight (out, in), and the same with LoRA's two matrices beside it."""

from __future__ import annotations

import mindspore as ms
from mindspore import Tensor, ops

from mindpeft.ops.cpu.library import Kernel, kernel, rows_of

WEIGHT_TYPES = (ms.float32, ms.bfloat16)


def _of_rows(x: list[int], weight: list[int], *_) -> tuple[int, ...]:
    return (*x[:-1], weight[0])


class _Gradients(Kernel):
    """What a product's weight and bias get; a graph in which they are frozen holds neither."""

    def __init__(self):
        super().__init__()
        self.weight_kernel = kernel("linear_grad_weight", lambda x, dy: (dy[-1], x[-1]))
        self.bias_kernel = kernel("sum_rows", lambda x: (x[-1],))

    def of_weight(self, x: Tensor, weight: Tensor, dy: Tensor) -> Tensor:
        return self.weight_kernel(x, dy).astype(weight.dtype)

    def of_bias(self, dy: Tensor) -> Tensor:
        return self.bias_kernel(dy)


class LinearKernel(_Gradients):
    """``x @ weight.T``: x (..., in) of float32, weight (out, in) of float32 or bfloat16."""

    def __init__(self):
        super().__init__()
        self.forward = kernel("linear", _of_rows)
        self.backward = kernel("linear_grad", lambda dy, weight: (*dy[:-1], weight[1]))

    def construct(self, x, weight):
        return self.forward(x, weight)

    def bprop(self, x, weight, out, dout):
        return self.backward(dout, weight), self.of_weight(x, weight, dout)


class LinearBiasKernel(_Gradients):
    """``x @ weight.T + bias``, bias (out,) of float32."""

    def __init__(self):
        super().__init__()
        self.forward = kernel("linear_bias", _of_rows)
        self.backward = kernel("linear_grad", lambda dy, weight: (*dy[:-1], weight[1]))

    def construct(self, x, weight, bias):
        return self.forward(x, weight, bias)

    def bprop(self, x, weight, bias, out, dout):
        return self.backward(dout, weight), self.of_weight(x, weight, dout), self.of_bias(dout)


def _with_hidden(x: list[int], weight: list[int], a: list[int], *_) -> tuple[tuple[int, ...], ...]:
    return (*x[:-1], weight[0]), (rows_of(x), a[0])


def _lora_gradients() -> ops.Custom:
    return kernel("lora_linear_grad", lambda x, weight, a, b, *_: (x, a, b), 3)


class LoraKernel(_Gradients):
    """``(x @ weight.T + hidden @ b.T, hidden)`` with ``hidden = scale * x @ a.T``.

    x (..., in), weight (out, in), a (r, in), b (out, r), scale one number; noise of
    `mindpeft.ops.cpu.dropout.Noise` for a dropout of the x before ``a.T``. Both get no gradient.
    """

    def __init__(self):
        super().__init__()
        self.forward = kernel("lora_linear", _with_hidden, 2)
        self.backward = _lora_gradients()

    def construct(self, x, weight, a, b, scale, noise):
        return self.forward(x, weight, a, b, scale, noise)

    def bprop(self, x, weight, a, b, scale, noise, out, dout):
        dy = dout[0]
        dx, da, db = self.backward(x, weight, a, b, scale, noise, out[1], dy)
        return dx, self.of_weight(x, weight, dy), da, db, ops.zeros_like(scale), ops.zeros_like(noise)


class LoraBiasKernel(_Gradients):
    """The same with a bias (out,) of the layer itself."""

    def __init__(self):
        super().__init__()
        self.forward = kernel("lora_linear_bias", _with_hidden, 2)
        self.backward = _lora_gradients()

    def construct(self, x, weight, a, b, scale, noise, bias):
        return self.forward(x, weight, a, b, scale, noise, bias)

    def bprop(self, x, weight, a, b, scale, noise, bias, out, dout):
        dy = dout[0]
        dx, da, db = self.backward(x, weight, a, b, scale, noise, out[1], dy)
        dweight, dbias = self.of_weight(x, weight, dy), self.of_bias(dy)
        return dx, dweight, da, db, ops.zeros_like(scale), ops.zeros_like(noise), dbias
