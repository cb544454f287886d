"""Dense products with a frozen weight (out, in) of int8 and a scale for each of its rows."""

from __future__ import annotations

from mindspore import ops

from mindpeft.ops.cpu.library import Kernel, kernel, must_fit


def _of_rows(x: list[int], weight: list[int], *_) -> tuple[int, ...]:
    must_fit(x, weight)
    return (*x[:-1], weight[0])


def _of_x() -> ops.Custom:
    return kernel("int8_linear_grad", lambda dy, weight, scale: (*dy[:-1], weight[1]))


class Int8LinearKernel(Kernel):
    """``x @ (weight * scale[:, None]).T``: x (..., in) of float32, scale (out,); x alone gets a gradient.

    More than 8 rows are rounded to 8 bits each where the processor multiplies such numbers fast.
    """

    def __init__(self):
        super().__init__()
        of_x = _of_x()

        def gradients(x, weight, scale, out, dout):
            return of_x(dout, weight, scale), ops.zeros_like(weight), ops.zeros_like(scale)

        self.forward = kernel("int8_linear", _of_rows, gradients=gradients)

    def construct(self, x, weight, scale):
        return self.forward(x, weight, scale)


class Int8LinearBiasKernel(Kernel):
    """The same plus a bias (out,) of float32, which gets a gradient too."""

    def __init__(self):
        super().__init__()
        of_x, of_bias = _of_x(), kernel("sum_rows", lambda x: (x[-1],))

        def gradients(x, weight, scale, bias, out, dout):
            frozen = ops.zeros_like(weight), ops.zeros_like(scale)
            return of_x(dout, weight, scale), *frozen, of_bias(dout)

        self.forward = kernel("int8_linear_bias", _of_rows, gradients=gradients)

    def construct(self, x, weight, scale, bias):
        return self.forward(x, weight, scale, bias)
