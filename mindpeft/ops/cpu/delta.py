"""Dense products with the sum of a weight and a delta weight.

They keep the delta for the backward pass, never the sum. The gradients of both are the same product; a graph
holds it once, and not at all where neither is trained.
"""

from __future__ import annotations

from mindspore import ops

from mindpeft.ops.cpu.library import Kernel, kernel, must_fit


def _named(name: str, bias: bool) -> str:
    return f"{name}_bias" if bias else name


def _product_shape(x: list[int], weight: list[int], *_) -> tuple[int, ...]:
    must_fit(x, weight)
    return (*x[:-1], weight[0])


def _of_x(name: str) -> ops.Custom:
    """dy, weight, the delta's tensors -> dx."""
    return kernel(f"{name}_grad", lambda dy, weight, *_: (*dy[:-1], weight[1]))


def _of_weight() -> ops.Custom:
    """x, dy -> dweight."""
    return kernel("linear_grad_weight", lambda x, dy: (dy[-1], x[-1]))


def _of_bias() -> ops.Custom:
    return kernel("sum_rows", lambda x: (x[-1],))


class DeltaKernel(Kernel):
    """``x @ (weight + delta).T``: x (..., in), weight and delta (out, in), all of float32.

    Args:
        bias: the last input is a bias (out,), which is added.
    """

    def __init__(self, bias: bool = False):
        super().__init__()
        of_x, of_weight, of_bias = _of_x("delta_linear"), _of_weight(), _of_bias()

        def gradients(x, weight, delta, out, dout):
            dweight = of_weight(x, dout)
            return of_x(dout, weight, delta), dweight, dweight

        def gradients_with_bias(x, weight, delta, bias, out, dout):
            return (*gradients(x, weight, delta, out, dout), of_bias(dout))

        backward = gradients_with_bias if bias else gradients
        self.forward = kernel(_named("delta_linear", bias), _product_shape, gradients=backward)

    def construct(self, *inputs):
        return self.forward(*inputs)


class SparseDeltaKernel(Kernel):
    """The same with a sparse delta: numbers (n,) that are added at rows and columns (2, n) of int32.

    Args:
        bias: the last input is a bias (out,), which is added.
    """

    def __init__(self, bias: bool = False):
        super().__init__()
        name = "sparse_delta_linear"
        of_x, of_weight, of_bias = _of_x(name), _of_weight(), _of_bias()
        of_values = kernel(f"{name}_grad_values", lambda x, dy, places: (places[1],))

        def gradients(x, weight, values, places, out, dout):
            dx, dvalues = of_x(dout, weight, values, places), of_values(x, dout, places)
            return dx, of_weight(x, dout), dvalues, ops.zeros_like(places)

        def gradients_with_bias(x, weight, values, places, bias, out, dout):
            return (*gradients(x, weight, values, places, out, dout), of_bias(dout))

        backward = gradients_with_bias if bias else gradients
        self.forward = kernel(_named(name, bias), _product_shape, gradients=backward)

    def construct(self, *inputs):
        return self.forward(*inputs)
