"""The linear layer."""

from __future__ import annotations

import mindspore as ms
import mindspore.nn as nn
from mindspore import Tensor

from mindpeft.nn.parameter import empty_parameter
from mindpeft.ops.linear import linear


class Linear(nn.Cell):
    """``y = x @ weight.T + bias`` with PyTorch's names and layout: weight (out, in), bias (out,)."""

    def __init__(self, in_features: int, out_features: int, bias: bool = True, dtype: ms.Type = ms.float32):
        super().__init__()
        self.in_features = in_features
        self.out_features = out_features
        self.weight = empty_parameter((out_features, in_features), dtype)
        self.bias = empty_parameter((out_features,), dtype) if bias else None

    def construct(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias)
