"""Activation functions, under the names that Hugging Face configs use (``hidden_act``)."""

from __future__ import annotations

import math

import mindspore as ms
import mindspore.nn as nn
from mindspore import Tensor, ops

from mindpeft.errors import InputError, did_you_mean
from mindpeft.ops.cpu import kernels_on
from mindpeft.ops.cpu.activations import ACTIVATIONS as KERNELS
from mindpeft.ops.cpu.activations import ActivationKernel, GateKernel
from mindpeft.ops.device import on_cpu


class Gelu(nn.Cell):
    """Exact GELU, ``x * Phi(x)`` with Phi the normal distribution function (Hendrycks and Gimpel, 2016)."""

    def construct(self, x: Tensor) -> Tensor:
        return ops.gelu(x)


class _GeluAndCdf(nn.Cell):
    """``(x * Phi(x), Phi(x))``; Phi is returned so that the backward pass need not call erf a second time."""

    def construct(self, x):
        cdf = (ops.erf(x * math.sqrt(0.5)) + 1.0) * 0.5
        return x * cdf, cdf

    def bprop(self, x, out, dout):
        density = ops.exp(ops.square(x) * -0.5) * (1.0 / math.sqrt(2.0 * math.pi))
        return (dout[0] * (out[1] + x * density),)


class CpuGelu(nn.Cell):
    """Exact GELU for the CPU, where the built-in operator is slower and keeps its buffers."""

    def __init__(self):
        super().__init__()
        self.gelu_and_cdf = _GeluAndCdf()

    def construct(self, x: Tensor) -> Tensor:
        return self.gelu_and_cdf(x)[0]


class TanhGelu(nn.Cell):
    """GELU by its tanh approximation, ``x/2 * (1 + tanh(sqrt(2/pi) * (x + 0.044715 x^3)))``."""

    def construct(self, x: Tensor) -> Tensor:
        # (1 + tanh(z)) / 2 = sigmoid(2 z), which is the more exact operator on the CPU
        return x * ops.sigmoid((x + 0.044715 * x * x * x) * (2.0 * math.sqrt(2.0 / math.pi)))


class CpuTanh(nn.Cell):
    """tanh for the CPU, where the built-in operator is wrong by 1e-4 at |x| = 5."""

    def construct(self, x: Tensor) -> Tensor:
        bounded = ops.clamp(x, -20.0, 20.0)  # beyond it tanh is 1 in float32 long before sinh overflows
        return ops.RealDiv()(ops.sinh(bounded), ops.cosh(bounded))

    def bprop(self, x, out, dout):
        return (dout * (1.0 - ops.square(out)),)


def tanh() -> nn.Cell:
    """Return the Cell of tanh for the current device."""
    return CpuTanh() if on_cpu() else nn.Tanh()


class QuickGelu(nn.Cell):
    """``x * sigmoid(1.702 x)``."""

    def construct(self, x: Tensor) -> Tensor:
        return x * ops.sigmoid(x * 1.702)


class Silu(nn.Cell):
    """``x * sigmoid(x)``."""

    def construct(self, x: Tensor) -> Tensor:
        return x * ops.sigmoid(x)


def _exact_gelu() -> nn.Cell:
    return CpuGelu() if on_cpu() else Gelu()


ACTIVATIONS = {
    "gelu": _exact_gelu,
    "gelu_python": _exact_gelu,
    "gelu_new": TanhGelu,
    "gelu_fast": TanhGelu,
    "gelu_pytorch_tanh": TanhGelu,
    "quick_gelu": QuickGelu,
    "relu": nn.ReLU,
    "silu": Silu,
    "swish": Silu,
    "tanh": tanh,
    "sigmoid": nn.Sigmoid,
}


def activation(name: str) -> nn.Cell:
    """Return the Cell of a Hugging Face activation name.

    Raises:
        InputError: the name is none of ``ACTIVATIONS``.
    """
    if name not in ACTIVATIONS:
        raise InputError(
            f"unknown activation {name!r} (hidden_act); known: {', '.join(ACTIVATIONS)}"
            + did_you_mean(name, ACTIVATIONS)
        )
    plain = ACTIVATIONS[name]()
    return FastActivation(name, plain) if kernels_on() and name in KERNELS else plain


class FastActivation(nn.Cell):
    """An activation by its kernel where the numbers are float32."""

    def __init__(self, name: str, plain: nn.Cell):
        super().__init__()
        self.kernel, self.plain = ActivationKernel(name), plain

    def construct(self, x: Tensor) -> Tensor:
        if self.kernel is None or x.dtype != ms.float32:
            return self.plain(x)
        return self.kernel(x)


class Gate(nn.Cell):
    """``activation(gate) * up``, the inner part of a gated feed-forward layer (Shazeer, 2020).

    Args:
        name: of the activation, as for `activation`.
    """

    def __init__(self, name: str):
        super().__init__()
        self.activation = activation(name)
        self.kernel = GateKernel(name) if kernels_on() and name in KERNELS else None

    def construct(self, gate: Tensor, up: Tensor) -> Tensor:
        if self.kernel is None or gate.dtype != ms.float32:
            return self.activation(gate) * up
        return self.kernel(gate, up)
