"""The linear layer with a frozen weight of 8 bits."""

from __future__ import annotations

import mindspore as ms
import numpy as np
from mindspore import Tensor, nn, ops

from mindpeft.errors import InputError
from mindpeft.nn.linear import Linear
from mindpeft.nn.parameter import empty_parameter
from mindpeft.ops.cpu import kernels_on
from mindpeft.ops.cpu.int8 import Int8LinearBiasKernel, Int8LinearKernel
from mindpeft.ops.linear import linear

_LARGEST = 127  # -128 stays unused, so that rows are symmetric


class Int8Linear(nn.Cell):
    """``y = x @ (weight * scale[:, None]).T + bias``, all of it float32 but the weight.

    The weight is (out, in), scale and bias are (out,); the bias alone may be trained.

    Args:
        source: the layer that it takes the place of; its bias becomes this one's.
    """

    def __init__(self, source: Linear):
        super().__init__()
        self.in_features, self.out_features = source.in_features, source.out_features
        self.weight = empty_parameter((self.out_features, self.in_features), ms.int8)
        self.scale = empty_parameter((self.out_features,))
        self.weight.requires_grad = self.scale.requires_grad = False
        self.bias = source.bias
        self.is_product = False  # see `Linear`
        self.kernel = None
        if kernels_on():
            self.kernel = Int8LinearKernel() if self.bias is None else Int8LinearBiasKernel()

    def take(self, weight: np.ndarray) -> None:
        """Keep a weight (out, in) of float32, rounded.

        Raises:
            InputError: it has numbers that are not finite.
        """
        codes, scale = quantised(weight)
        if not np.isfinite(scale).all():
            raise InputError(f"{self.weight.name} has NaN or infinity, which int8 can't hold")
        self.weight.set_data(Tensor(codes))
        self.scale.set_data(Tensor(scale))

    def read(self) -> np.ndarray:
        """The weight (out, in) in float32, as it was rounded."""
        return self.weight.asnumpy().astype(np.float32) * self.scale.asnumpy()[:, None]

    def float_weight(self) -> Tensor:
        """The same inside a graph."""
        return ops.cast(self.weight, ms.float32) * self.scale.reshape((-1, 1))

    def construct(self, x: Tensor) -> Tensor:
        if self.kernel is None or x.dtype != ms.float32:  # a graph that is written to a file
            return linear(x, self.float_weight(), self.bias)
        if self.bias is None:
            return self.kernel(x, self.weight, self.scale)
        return self.kernel(x, self.weight, self.scale, ops.cast(self.bias, ms.float32))


def quantised(weight: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The codes (out, in) and the scale (out,) of a weight: each row's largest number becomes 127 or -127."""
    scale = np.abs(weight).max(1, initial=0) / np.float32(_LARGEST)
    steps = np.where(scale > 0, scale, 1)[:, None]
    with np.errstate(invalid="ignore"):  # of what is not finite, which the scale tells
        codes = np.rint(weight / steps).clip(-_LARGEST, _LARGEST).astype(np.int8)
    return codes, scale.astype(np.float32)
