"""The linear layer, and the same with its weight the other way round."""

from __future__ import annotations

import mindspore as ms
import mindspore.nn as nn
from mindspore import Tensor

from mindpeft.nn.parameter import empty_parameter
from mindpeft.ops.linear import Product


class Linear(nn.Cell):
    """``y = x @ weight.T + bias`` with PyTorch's names and layout: weight (out, in), bias (out,).

    Attributes:
        is_product: that ``x @ weight.T`` is all it computes, with no bias and no layer around it.
    """

    def __init__(self, in_features: int, out_features: int, bias: bool = True, dtype: ms.Type = ms.float32):
        super().__init__()
        self.in_features = in_features
        self.out_features = out_features
        self.weight = empty_parameter((out_features, in_features), dtype)
        self.bias = empty_parameter((out_features,), dtype) if bias else None
        self.is_product = not bias
        self.product = Product()

    def construct(self, x: Tensor) -> Tensor:
        return self.product(x, self.weight, self.bias)


class Conv1D(nn.Cell):
    """``y = x @ weight + bias`` with GPT-2's layout: weight (in, out), bias (out,)."""

    def __init__(self, in_features: int, out_features: int, dtype: ms.Type = ms.float32):
        super().__init__()
        self.in_features = in_features
        self.out_features = out_features
        self.weight = empty_parameter((in_features, out_features), dtype)
        self.bias = empty_parameter((out_features,), dtype)
        self.product = Product(turned=True)

    def construct(self, x: Tensor) -> Tensor:
        return self.product(x, self.weight, self.bias)
