"""Dense products with a weight, and the same with LoRA's two matrices beside it.

A graph in which weight and bias are frozen, or in which nobody wants the gradient of x, does not hold those.
"""

from __future__ import annotations

from collections.abc import Callable

import mindspore as ms
from mindspore import ops

from mindpeft.ops.cpu.library import Kernel, kernel, must_fit, rows_of

WEIGHT_TYPES = (ms.float32, ms.bfloat16)


def _named(name: str, turned: bool, rest: str = "") -> str:
    """A kernel for weights (out, in), or (in, out)."""
    return f"{name}_turned{rest}" if turned else f"{name}{rest}"


def _product_shape(turned: bool) -> Callable:
    def shape(x: list[int], weight: list[int], *_) -> tuple[int, ...]:
        out, into = weight[::-1] if turned else weight
        must_fit(x, [into])
        return (*x[:-1], out)

    return shape


def _lora_shapes(turned: bool) -> Callable:
    """Of a product with LoRA and of the r columns inside."""
    product = _product_shape(turned)

    def shapes(x: list[int], weight: list[int], a: list[int], *_) -> tuple[tuple[int, ...], ...]:
        must_fit(x, a)
        return product(x, weight), (rows_of(x), a[0])

    return shapes


def _of_x(turned: bool) -> ops.Custom:
    """dy, weight -> dx."""
    into = 0 if turned else 1
    return kernel(_named("linear", turned, "_grad"), lambda dy, weight: (*dy[:-1], weight[into]))


def _of_weight(turned: bool) -> Callable:
    """x, weight, dy -> dweight; a function that a graph can call."""
    product = kernel("linear_grad_weight", lambda x, dy: (dy[-1], x[-1]))

    def gradient(x, weight, dy):
        found = product(dy, x) if turned else product(x, dy)
        return found.astype(weight.dtype)

    return gradient


def _of_bias() -> ops.Custom:
    return kernel("sum_rows", lambda x: (x[-1],))


class LinearKernel(Kernel):
    """``x @ weight.T``: x (..., in) of float32, weight (out, in) of float32 or bfloat16.

    Args:
        turned: the weight is (in, out), for ``x @ weight``.
    """

    def __init__(self, turned: bool = False):
        super().__init__()
        of_x, of_weight = _of_x(turned), _of_weight(turned)

        def gradients(x, weight, out, dout):
            return of_x(dout, weight), of_weight(x, weight, dout)

        self.forward = kernel(_named("linear", turned), _product_shape(turned), gradients=gradients)

    def construct(self, x, weight):
        return self.forward(x, weight)


class LinearBiasKernel(Kernel):
    """The same ``+ bias``, bias (out,) of float32."""

    def __init__(self, turned: bool = False):
        super().__init__()
        of_x, of_weight, of_bias = _of_x(turned), _of_weight(turned), _of_bias()

        def gradients(x, weight, bias, out, dout):
            return of_x(dout, weight), of_weight(x, weight, dout), of_bias(dout)

        self.forward = kernel(_named("linear", turned, "_bias"), _product_shape(turned), gradients=gradients)

    def construct(self, x, weight, bias):
        return self.forward(x, weight, bias)


def _lora_gradients(turned: bool) -> Callable:
    """x, x as it was kept, the other inputs, hidden, dy -> gradients; a function that a graph can call."""
    name = _named("lora_linear", turned, "_grad")
    of_x = kernel(name, lambda x, *_: x)
    of_pair = kernel(f"{name}_pair", lambda x, weight, a, b, *_: (a, b), 2)
    of_weight = _of_weight(turned)

    def gradients(x, kept, weight, a, b, scale, noise, hidden, dy):
        dx = of_x(kept, weight, a, b, scale, noise, hidden, dy)
        da, db = of_pair(kept, weight, a, b, scale, noise, hidden, dy)
        return dx, of_weight(x, weight, dy), da, db, ops.zeros_like(scale), ops.zeros_like(noise)

    return gradients


class Narrow(Kernel):
    """A copy in bfloat16 of x, to be kept for the backward pass; layers that share x share it."""

    def __init__(self):
        super().__init__()
        self.narrow = kernel("narrow", lambda x: x, 0, kept=1)

    def construct(self, x):
        return self.narrow(ops.stop_gradient(x))


class LoraKernel(Kernel):
    """``(x @ weight.T + hidden @ b.T, hidden)`` with ``hidden = scale * x @ a.T``.

    x (..., in), weight (out, in), a (r, in), b (out, r), scale one number; noise of
    `mindpeft.ops.cpu.dropout.Noise` for a dropout of the x before ``a.T``. Both get no gradient.

    Args:
        turned: the weight is (in, out).
        less: keep x for the backward pass in bfloat16.
    """

    def __init__(self, turned: bool = False, less: bool = False):
        super().__init__()
        of_all = _lora_gradients(turned)

        def gradients(x, weight, a, b, scale, noise, out, dout):
            return of_all(x, x, weight, a, b, scale, noise, out[1], dout[0])

        def gradients_of_kept(x, weight, a, b, scale, noise, kept, out, dout):
            found = of_all(x, kept, weight, a, b, scale, noise, out[1], dout[0])
            return (*found, ops.zeros_like(kept))

        backward = gradients_of_kept if less else gradients
        self.forward = kernel(_named("lora_linear", turned), _lora_shapes(turned), 2, backward)
        self.narrow = Narrow() if less else None

    def construct(self, x, weight, a, b, scale, noise):
        if self.narrow is None:
            return self.forward(x, weight, a, b, scale, noise)
        return self.forward(x, weight, a, b, scale, noise, self.narrow(x))


class LoraBiasKernel(Kernel):
    """The same with a bias (out,) of the layer itself."""

    def __init__(self, turned: bool = False, less: bool = False):
        super().__init__()
        of_all, of_bias = _lora_gradients(turned), _of_bias()

        def gradients(x, weight, a, b, scale, noise, bias, out, dout):
            found = of_all(x, x, weight, a, b, scale, noise, out[1], dout[0])
            return (*found, of_bias(dout[0]))

        def gradients_of_kept(x, weight, a, b, scale, noise, bias, kept, out, dout):
            found = of_all(x, kept, weight, a, b, scale, noise, out[1], dout[0])
            return (*found, of_bias(dout[0]), ops.zeros_like(kept))

        backward = gradients_of_kept if less else gradients
        self.forward = kernel(_named("lora_linear", turned, "_bias"), _lora_shapes(turned), 2, backward)
        self.narrow = Narrow() if less else None

    def construct(self, x, weight, a, b, scale, noise, bias):
        if self.narrow is None:
            return self.forward(x, weight, a, b, scale, noise, bias)
        return self.forward(x, weight, a, b, scale, noise, bias, self.narrow(x))
