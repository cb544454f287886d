"""Normalisation over the last axis, also of a sum."""

from __future__ import annotations

from collections.abc import Callable

from mindspore import ops

from mindpeft.ops.cpu.library import Kernel, kernel, must_fit, rows_of, setting


def _normed(statistics: int, less: bool):
    def shapes(x: list[int], weight: list[int], *_) -> tuple:
        must_fit(x, weight)
        return x, *((rows_of(x),) for _ in range(statistics)), *([x] if less else [])

    return shapes


def _normed_sum(statistics: int, copies: int):
    """The same for a norm that gives the sum, keeps a copy of it, or both."""

    def shapes(x: list[int], residual: list[int], weight: list[int], *_) -> tuple:
        must_fit(x, weight)
        if list(x) != list(residual):
            raise ValueError(f"a residual of shape {tuple(residual)} doesn't fit {tuple(x)}")
        return x, *((rows_of(x),) for _ in range(statistics)), *([x] * copies)

    return shapes


def _rms_norm_backward(further: int = 0) -> Callable:
    """x, weight, scale, dy -> dx, dweight; behind dy the gradient of x from elsewhere, if there is one."""
    backward = kernel("rms_norm_grad", lambda x, *_: x, further=further)
    backward_weight = kernel("rms_norm_grad_weight", lambda x, *_: (x[-1],))

    def gradients(x, weight, scale, dy, *dsum):
        return backward(x, weight, scale, dy, *dsum), backward_weight(x, scale, dy)

    return gradients


def _layer_norm_backward(further: int = 0) -> Callable:
    """x, weight, mean, scale, dy -> dx, dweight, dbias; behind dy as above."""
    backward = kernel("layer_norm_grad", lambda x, *_: x, further=further)
    backward_weight = kernel("layer_norm_grad_weight", lambda x, *_: (x[-1],))
    backward_bias = kernel("sum_rows", lambda x: (x[-1],))

    def gradients(x, weight, mean, scale, dy, *dsum):
        dx = backward(x, weight, mean, scale, dy, *dsum)
        return dx, backward_weight(x, mean, scale, dy), backward_bias(dy)

    return gradients


class RmsNormKernel(Kernel):
    """``(y, scale)``: x (..., width), weight (width,); scale (rows,) is for the backward pass.

    Args:
        less: keep x for the backward pass in bfloat16, as one more output.
    """

    def __init__(self, eps: float, less: bool = False):
        super().__init__()
        self.epsilon, self.eps, self.less = eps, setting(eps), less
        backward = _rms_norm_backward()

        def gradients(x, weight, eps, out, dout):
            dx, dweight = backward(out[2] if less else x, weight, out[1], dout[0])
            return dx, dweight, ops.zeros_like(eps)

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
        backward = _layer_norm_backward()

        def gradients(x, weight, bias, eps, out, dout):
            kept = out[3] if less else x
            dx, dweight, dbias = backward(kept, weight, out[1], out[2], dout[0])
            return dx, dweight, dbias, ops.zeros_like(eps)

        self.forward = kernel("layer_norm", _normed(2, less), 3, gradients, int(less))

    def construct(self, x, weight, bias):
        return self.forward(x, weight, bias, self.eps)

    def keeping_less(self) -> LayerNormKernel:
        return LayerNormKernel(self.epsilon, less=True)


class RmsNormOfSumKernel(Kernel):
    """``(y, x + residual)``: x and residual (..., width), weight (width,).

    Args:
        with_sum: whether the sum is used; without, there is none to be used.
        less: keep the sum for the backward pass in bfloat16.
    """

    def __init__(self, eps: float, with_sum: bool, less: bool = False):
        super().__init__()
        self.epsilon, self.eps, self.with_sum, self.less = eps, setting(eps), with_sum, less
        wide = 1 if with_sum or not less else 0
        backward = _rms_norm_backward(further=int(with_sum))

        def gradients(x, residual, weight, eps, out, dout):
            further = (dout[2],) if with_sum else ()
            dx, dweight = backward(out[-1], weight, out[1], dout[0], *further)
            return dx, dx, dweight, ops.zeros_like(eps)

        shapes = _normed_sum(1, wide + less)
        self.forward = kernel(
            "rms_norm_of_sum", shapes, 2 + wide, gradients, int(less), with_sum=int(with_sum)
        )

    def construct(self, x, residual, weight):
        out = self.forward(x, residual, weight, self.eps)
        return out[0], out[2]

    def keeping_less(self) -> RmsNormOfSumKernel:
        return RmsNormOfSumKernel(self.epsilon, self.with_sum, less=True)


class LayerNormOfSumKernel(Kernel):
    """``(y, x + residual)``: x and residual (..., width), weight and bias (width,).

    Args:
        with_sum: whether the sum is used; without, there is none to be used.
        less: keep the sum for the backward pass in bfloat16.
    """

    def __init__(self, eps: float, with_sum: bool, less: bool = False):
        super().__init__()
        self.epsilon, self.eps, self.with_sum, self.less = eps, setting(eps), with_sum, less
        wide = 1 if with_sum or not less else 0
        backward = _layer_norm_backward(further=int(with_sum))

        def gradients(x, residual, weight, bias, eps, out, dout):
            further = (dout[3],) if with_sum else ()
            dx, dweight, dbias = backward(out[-1], weight, out[1], out[2], dout[0], *further)
            return dx, dx, dweight, dbias, ops.zeros_like(eps)

        shapes = _normed_sum(2, wide + less)
        self.forward = kernel(
            "layer_norm_of_sum", shapes, 3 + wide, gradients, int(less), with_sum=int(with_sum)
        )

    def construct(self, x, residual, weight, bias):
        out = self.forward(x, residual, weight, bias, self.eps)
        return out[0], out[3]

    def keeping_less(self) -> LayerNormOfSumKernel:
        return LayerNormOfSumKernel(self.epsilon, self.with_sum, less=True)
