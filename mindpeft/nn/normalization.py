"""Normalisation layers."""

from __future__ import annotations

import mindspore as ms
import mindspore.nn as nn
from mindspore import Tensor

from mindpeft.nn.parameter import empty_parameter
from mindpeft.ops.normalization import layer_norm


class LayerNorm(nn.Cell):
    """Layer normalisation over the last axis, with PyTorch's names: weight and bias of shape (width,)."""

    def __init__(self, width: int, eps: float = 1e-5, dtype: ms.Type = ms.float32):
        super().__init__()
        self.weight = empty_parameter((width,), dtype)
        self.bias = empty_parameter((width,), dtype)
        self.norm = layer_norm(eps)

    def construct(self, x: Tensor) -> Tensor:
        return self.norm(x, self.weight, self.bias)
