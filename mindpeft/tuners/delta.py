"""Layers whose adapter is a delta weight: y = (W + D) x + b.

Right around a linear cell of float32, W and D are summed: the forward pass, the gradient of x and that of D
are one product each. Elsewhere D's product comes beside the cell's: around other layers, which compute more
than a product with their weight, and beside a weight of half precision, whose own product is faster.
"""

from __future__ import annotations

from typing import Any

import mindspore as ms
from mindspore import nn, ops

from mindpeft.nn.linear import Linear
from mindpeft.ops.delta import DeltaProduct
from mindpeft.tuners.base import TunerLayer


class DeltaLayer(TunerLayer):
    """A layer with a delta weight."""

    def __init__(self, base_layer: nn.Cell, *slot: Any) -> None:
        super().__init__(base_layer, *slot)
        self.delta_product = DeltaProduct()
        self.is_around_linear = type(base_layer) is Linear

    def is_summed(self, x: ms.Tensor) -> bool:
        """Whether the delta is added to the weight; a constant of the graph."""
        if not self.is_around_linear or self.base_layer.weight.dtype != ms.float32:
            return False
        return x.dtype == ms.float32 and self.slot_dtype == ms.float32

    def with_delta(self, x: ms.Tensor, delta: ms.Tensor) -> ms.Tensor:
        """(W + D) x + b for D (out, in) in the slot's dtype; runs inside a graph."""
        base = self.base_layer
        if self.is_summed(x):
            return self.delta_product(x, base.weight, delta, base.bias)
        return self.beside(x, self.linear(ops.cast(x, self.slot_dtype), delta))

    def beside(self, x: ms.Tensor, update: ms.Tensor) -> ms.Tensor:
        """The cell's own result for x with an update in the slot's dtype; runs inside a graph."""
        result = self.base_layer(x)
        return ops.cast(ops.cast(result, self.slot_dtype) + update, result.dtype)


class ThinLayer(DeltaLayer):
    """One whose delta is a product of two thin matrices, which is multiplied out where that pays."""

    def pays(self, x: ms.Tensor, rank: int, n_out: int) -> bool:
        """Whether the delta costs less than two thin products; a constant of the graph.

        In a training step they cost rank (in + out) for each row, twice; the delta out * in for each row, in
        its gradient, and for each column of the thin matrices, three times.
        """
        n_in = x.shape[-1]
        rows = x.size // n_in
        thin = 2 * rows * rank * (n_in + n_out)
        return self.is_summed(x) and thin > (rows + 3 * rank) * n_in * n_out
