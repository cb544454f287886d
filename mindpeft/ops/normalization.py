"""Layer normalisation."""

from __future__ import annotations

import mindspore.nn as nn
from mindspore import Tensor, ops

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
        return dx.reshape(x.shape), (dy * normed).sum(0), dy.sum(0)


class CpuLayerNorm(nn.Cell):
    """Layer normalisation for the CPU."""

    def __init__(self, eps: float):
        super().__init__()
        self.norm_and_moments = _NormAndMoments(eps)

    def construct(self, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return self.norm_and_moments(x, weight, bias)[0]


def layer_norm(eps: float) -> nn.Cell:
    """Return the Cell ``(x, weight, bias) -> y`` for the current device; weight and bias are (width,)."""
    return CpuLayerNorm(eps) if on_cpu() else LayerNorm(eps)
