"""Normalisation layers."""

from __future__ import annotations

import mindspore as ms
import mindspore.nn as nn
import numpy as np
from mindspore import Tensor

from mindpeft.nn.parameter import empty_parameter
from mindpeft.ops.normalization import layer_norm, rms_norm


class LayerNorm(nn.Cell):
    """Layer normalisation over the last axis, with PyTorch's names: weight and bias of shape (width,).

    Without ``affine`` both are constants, 1 and 0.
    """

    def __init__(self, width: int, eps: float = 1e-5, dtype: ms.Type = ms.float32, affine: bool = True):
        super().__init__()
        self.weight = empty_parameter((width,), dtype) if affine else Tensor(np.ones(width), dtype)
        self.bias = empty_parameter((width,), dtype) if affine else Tensor(np.zeros(width), dtype)
        self.norm = layer_norm(eps)

    def construct(self, x: Tensor) -> Tensor:
        return self.norm(x, self.weight, self.bias)


class RMSNorm(nn.Cell):
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

    def construct(self, x: Tensor) -> Tensor:
        return self.norm(x, self.weight + self.offset if self.offset else self.weight)
