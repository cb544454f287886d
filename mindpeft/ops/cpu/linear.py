"""Dense products with a weight of either layout, and the same with LoRA's two matrices beside it."""

from __future__ import annotations

import mindspore as ms
from mindspore import Tensor, ops

from mindpeft.ops.cpu.library import Kernel, kernel, rows_of

WEIGHT_TYPES = (ms.float32, ms.bfloat16)


def _features(weight: list[int], turned: bool) -> tuple[int, int]:
    """How many numbers go out and in."""
    return (weight[1], weight[0]) if turned else (weight[0], weight[1])


class _Products(Kernel):
    """What a product's weight and bias get.

    A graph in which they are frozen, or in which nobody wants the gradient of x, does not hold those.

    Args:
        turned: the weight is (in, out), not (out, in).
    """

    def __init__(self, turned: bool):
        super().__init__()
        self.turned = turned
        self.weight_kernel = kernel("linear_grad_weight", lambda x, dy: (dy[-1], x[-1]))
        self.bias_kernel = kernel("sum_rows", lambda x: (x[-1],))

    def of_weight(self, x: Tensor, weight: Tensor, dy: Tensor) -> Tensor:
        gradient = self.weight_kernel(dy, x) if self.turned else self.weight_kernel(x, dy)
        return gradient.astype(weight.dtype)

    def of_bias(self, dy: Tensor) -> Tensor:
        return self.bias_kernel(dy)


class _Linear(_Products):
    """What the two below share."""

    def __init__(self, name: str, turned: bool):
        super().__init__(turned)
        layout = "linear_turned" if turned else "linear"
        self.forward = kernel(layout + name, lambda x, weight, *_: (*x[:-1], _features(weight, turned)[0]))
        self.backward = kernel(f"{layout}_grad", lambda dy, weight: (*dy[:-1], _features(weight, turned)[1]))


class LinearKernel(_Linear):
    """``x @ weight.T``: x (..., in) of float32, weight (out, in) of float32 or bfloat16.

    Args:
        turned: the weight is (in, out), for ``x @ weight``.
    """

    def __init__(self, turned: bool = False):
        super().__init__("", turned)

    def construct(self, x, weight):
        return self.forward(x, weight)

    def bprop(self, x, weight, out, dout):
        return self.backward(dout, weight), self.of_weight(x, weight, dout)


class LinearBiasKernel(_Linear):
    """The same ``+ bias``, bias (out,) of float32."""

    def __init__(self, turned: bool = False):
        super().__init__("_bias", turned)

    def construct(self, x, weight, bias):
        return self.forward(x, weight, bias)

    def bprop(self, x, weight, bias, out, dout):
        return self.backward(dout, weight), self.of_weight(x, weight, dout), self.of_bias(dout)


class _Lora(_Products):
    """What the two below share."""

    def __init__(self, name: str, turned: bool):
        super().__init__(turned)
        layout = "lora_linear_turned" if turned else "lora_linear"
        self.forward = kernel(
            layout + name,
            lambda x, weight, a, *_: ((*x[:-1], _features(weight, turned)[0]), (rows_of(x), a[0])),
            2,
        )
        self.backward = kernel(f"{layout}_grad", lambda x, *_: x)
        self.backward_pair = kernel(f"{layout}_grad_pair", lambda x, weight, a, b, *_: (a, b), 2)


class LoraKernel(_Lora):
    """``(x @ weight.T + hidden @ b.T, hidden)`` with ``hidden = scale * x @ a.T``.

    x (..., in), weight (out, in), a (r, in), b (out, r), scale one number; noise of
    `mindpeft.ops.cpu.dropout.Noise` for a dropout of the x before ``a.T``. Both get no gradient.

    Args:
        turned: the weight is (in, out).
    """

    def __init__(self, turned: bool = False):
        super().__init__("", turned)

    def construct(self, x, weight, a, b, scale, noise):
        return self.forward(x, weight, a, b, scale, noise)

    def bprop(self, x, weight, a, b, scale, noise, out, dout):
        dy = dout[0]
        dx = self.backward(x, weight, a, b, scale, noise, out[1], dy)
        da, db = self.backward_pair(x, weight, a, b, scale, noise, out[1], dy)
        return dx, self.of_weight(x, weight, dy), da, db, ops.zeros_like(scale), ops.zeros_like(noise)


class LoraBiasKernel(_Lora):
    """The same with a bias (out,) of the layer itself."""

    def __init__(self, turned: bool = False):
        super().__init__("_bias", turned)

    def construct(self, x, weight, a, b, scale, noise, bias):
        return self.forward(x, weight, a, b, scale, noise, bias)

    def bprop(self, x, weight, a, b, scale, noise, bias, out, dout):
        dy = dout[0]
        dx = self.backward(x, weight, a, b, scale, noise, out[1], dy)
        da, db = self.backward_pair(x, weight, a, b, scale, noise, out[1], dy)
        dweight, dbias = self.of_weight(x, weight, dy), self.of_bias(dy)
        return dx, dweight, da, db, ops.zeros_like(scale), ops.zeros_like(noise), dbias
