"""Normalisation layers, and the norm of a residual sum."""

from __future__ import annotations

import mindspore as ms
import mindspore.nn as nn
import numpy as np
from mindspore import Tensor

from mindpeft.nn.hooks import is_listened_to
from mindpeft.nn.parameter import empty_parameter
from mindpeft.ops.normalization import layer_norm, rms_norm


class Norm(nn.Cell):
    """What both norms share; they define ``norm`` and ``factors``."""

    def factors(self) -> tuple[Tensor, ...]:
        """What ``norm`` takes besides a tensor; runs inside a graph."""
        raise NotImplementedError

    def construct(self, x: Tensor) -> Tensor:
        return self.norm(x, *self.factors())

    @property
    def takes_sums(self) -> bool:
        """Whether nobody wants to see its calls."""
        return not is_listened_to(self)


class LayerNorm(Norm):
    """Layer normalisation over the last axis, with PyTorch's names: weight and bias of shape (width,).

    Without ``affine`` both are constants, 1 and 0.
    """

    def __init__(self, width: int, eps: float = 1e-5, dtype: ms.Type = ms.float32, affine: bool = True):
        super().__init__()
        self.weight = empty_parameter((width,), dtype) if affine else Tensor(np.ones(width), dtype)
        self.bias = empty_parameter((width,), dtype) if affine else Tensor(np.zeros(width), dtype)
        self.norm = layer_norm(eps)

    def factors(self) -> tuple[Tensor, ...]:
        return self.weight, self.bias


class RMSNorm(Norm):
    """RMS normalisation over the last axis, with PyTorch's name: weight of shape (width,).

    Args:
        width: of the last axis.
        eps: added to the mean square.
        offset: what a weight of zero stands for; Gemma's files hold the difference to one.
    """

    def __init__(self, width: int, eps: float = 1e-6, offset: float = 0.0, dtype: ms.Type = ms.float32):
        super().__init__()
        self.weight = empty_parameter((width,), dtype)
        self.offset = offset
        self.norm = rms_norm(eps)

    def factors(self) -> tuple[Tensor, ...]:
        return (self.weight + self.offset if self.offset else self.weight,)


def norm_of_sum(norm: nn.Cell, x: Tensor, residual: Tensor) -> Tensor:
    """``norm(x + residual)``, in one pass unless a layer of an adapter is around the norm; for graphs."""
    if isinstance(norm, Norm) and norm.takes_sums:
        return norm.norm.of_sum(x, residual, *norm.factors())
    return norm(x + residual)


def norm_and_sum(norm: nn.Cell, x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
    """The same, and ``x + residual`` behind it."""
    if isinstance(norm, Norm) and norm.takes_sums:
        return norm.norm.with_sum(x, residual, *norm.factors())
    total = x + residual
    return norm(total), total
