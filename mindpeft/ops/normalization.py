"""Layer normalisation and its variant without a mean."""

from __future__ import annotations

import mindspore as ms
import mindspore.nn as nn
from mindspore import Tensor, ops

from mindpeft.ops.cpu import kernels_on
from mindpeft.ops.cpu.library import Kernel
from mindpeft.ops.cpu.norms import (
    LayerNormKernel,
    LayerNormOfSumKernel,
    RmsNormKernel,
    RmsNormOfSumKernel,
)
from mindpeft.ops.device import on_cpu


class LayerNorm(nn.Cell):
    """``(x - mean) / sqrt(var + eps) * weight + bias`` over the last axis (Ba et al., 2016)."""

    def __init__(self, eps: float):
        super().__init__()
        self.norm = ops.LayerNorm(-1, -1, eps)

    def construct(self, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return self.norm(x, weight, bias)[0]


class _NormAndMoments(nn.Cell):
    """The built-in forward pass with a backward pass of whole-tensor operators.

    On the CPU LayerNormGrad takes five times as long as the forward pass, and any broadcasting operator keeps
    four times its output; Tile does not.
    """

    def __init__(self, eps: float):
        super().__init__()
        self.eps = eps
        self.norm = ops.LayerNorm(-1, -1, eps)
        self.row_sum = ops.ReduceSum(keep_dims=True)
        self.tile = ops.Tile()

    def construct(self, x, weight, bias):
        return self.norm(x, weight, bias)

    def bprop(self, x, weight, bias, out, dout):
        _, mean, variance = out
        width = x.shape[-1]
        rows = x.reshape((-1, width))
        dy = dout[0].reshape((-1, width))
        across, down = (1, width), (rows.shape[0], 1)
        scale = self.tile(ops.rsqrt(variance.reshape((-1, 1)) + self.eps), across)
        normed = (rows - self.tile(mean.reshape((-1, 1)), across)) * scale
        dnormed = dy * self.tile(weight.reshape((1, -1)), down)
        mean_d = self.tile(self.row_sum(dnormed, -1) * (1.0 / width), across)
        mean_dn = self.tile(self.row_sum(dnormed * normed, -1) * (1.0 / width), across)
        dx = (dnormed - mean_d - normed * mean_dn) * scale
        dweight = (dy * normed).sum(0)  # moments are float32, whatever x is
        return dx.reshape(x.shape).astype(x.dtype), dweight.astype(weight.dtype), dy.sum(0)


class CpuLayerNorm(nn.Cell):
    """Layer normalisation for the CPU."""

    def __init__(self, eps: float):
        super().__init__()
        self.norm_and_moments = _NormAndMoments(eps)

    def construct(self, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return self.norm_and_moments(x, weight, bias)[0]


def layer_norm(eps: float) -> FastNorm:
    """Return the Cell ``(x, weight, bias) -> y`` for the current device; weight and bias are (width,)."""
    plain = CpuLayerNorm(eps) if on_cpu() else LayerNorm(eps)
    return FastNorm(eps, plain, LayerNormKernel, LayerNormOfSumKernel)


class RmsNorm(nn.Cell):
    """``x / sqrt(mean(x^2) + eps) * weight`` over the last axis (Zhang and Sennrich, 2019), in float32."""

    def __init__(self, eps: float):
        super().__init__()
        self.eps = eps

    def construct(self, x: Tensor, weight: Tensor) -> Tensor:
        wide = x.astype(ms.float32)
        scale = ops.rsqrt(ops.square(wide).mean(-1, keep_dims=True) + self.eps)
        return (wide * scale * weight.astype(ms.float32)).astype(x.dtype)


class _NormAndScale(nn.Cell):
    """``(x scale weight, scale)``; scale (rows,) is returned so that the backward pass has it."""

    def __init__(self, eps: float):
        super().__init__()
        self.eps = eps
        self.row_sum = ops.ReduceSum(keep_dims=True)
        self.tile = ops.Tile()

    def construct(self, x, weight):
        width = x.shape[-1]
        rows = x.reshape((-1, width))
        scale = ops.rsqrt(self.row_sum(ops.square(rows), -1) * (1.0 / width) + self.eps)
        down = self.tile(weight.reshape((1, -1)), (rows.shape[0], 1))
        return (rows * self.tile(scale, (1, width)) * down).reshape(x.shape), scale

    def bprop(self, x, weight, out, dout):
        width = x.shape[-1]
        rows, dy = x.reshape((-1, width)), dout[0].reshape((-1, width))
        across, down = (1, width), (rows.shape[0], 1)
        scale = self.tile(out[1], across)
        normed = rows * scale
        dnormed = dy * self.tile(weight.reshape((1, -1)), down)
        shared = self.tile(self.row_sum(dnormed * normed, -1) * (1.0 / width), across)
        return ((dnormed - normed * shared) * scale).reshape(x.shape), (dy * normed).sum(0)


class CpuRmsNorm(nn.Cell):
    """RMS normalisation for the CPU, where a broadcast keeps its buffers."""

    def __init__(self, eps: float):
        super().__init__()
        self.norm_and_scale = _NormAndScale(eps)

    def construct(self, x: Tensor, weight: Tensor) -> Tensor:
        wide = self.norm_and_scale(x.astype(ms.float32), weight.astype(ms.float32))[0]
        return wide.astype(x.dtype)


def rms_norm(eps: float) -> FastNorm:
    """Return the Cell ``(x, weight) -> y`` for the current device; weight is (width,)."""
    plain = CpuRmsNorm(eps) if on_cpu() else RmsNorm(eps)
    return FastNorm(eps, plain, RmsNormKernel, RmsNormOfSumKernel)


class FastNorm(nn.Cell):
    """A norm of a tensor or of a sum, by its kernels where there are some and all numbers are float32."""

    def __init__(self, eps: float, plain: nn.Cell, of_one: type[Kernel], of_two: type[Kernel]):
        super().__init__()
        self.plain = plain
        on = kernels_on()
        self.kernel = of_one(eps) if on else None
        self.kernel_of_sum = of_two(eps, with_sum=False) if on else None
        self.kernel_with_sum = of_two(eps, with_sum=True) if on else None

    def construct(self, x: Tensor, weight: Tensor, *bias: Tensor) -> Tensor:
        if self.kernel is None or x.dtype != ms.float32 or weight.dtype != ms.float32:
            return self.plain(x, weight, *bias)
        return self.kernel(x, weight, *bias)[0]

    def of_sum(self, x: Tensor, residual: Tensor, weight: Tensor, *bias: Tensor) -> Tensor:
        """The norm of ``x + residual``; runs inside a graph."""
        if self.kernel_of_sum is None or not self.suit(x, residual, weight):
            return self.construct(x + residual, weight, *bias)
        return self.kernel_of_sum(x, residual, weight, *bias)[0]

    def with_sum(self, x: Tensor, residual: Tensor, weight: Tensor, *bias: Tensor) -> tuple[Tensor, Tensor]:
        """The norm of ``x + residual``, and that sum; runs inside a graph."""
        if self.kernel_with_sum is None or not self.suit(x, residual, weight):
            total = x + residual
            return self.construct(total, weight, *bias), total
        return self.kernel_with_sum(x, residual, weight, *bias)

    def suit(self, x: Tensor, residual: Tensor, weight: Tensor) -> bool:
        """Whether tensors are what the kernels of a sum take; a constant of a graph."""
        floats = x.dtype == ms.float32 and residual.dtype == ms.float32 and weight.dtype == ms.float32
        return floats and x.shape == residual.shape
