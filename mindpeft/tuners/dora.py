"""DoRA: LoRA that trains each row's length apart from its direction, W' = m (W + s B A) / |W + s B A|.

Liu et al. 2024, "DoRA: Weight-Decomposed Low-Rank Adaptation". The norms are taken over each output's weights
and are constants in the backward pass, as in section 4.3 of the paper.
"""

from __future__ import annotations

from typing import Any

import mindspore as ms
import numpy as np
from mindspore import nn, ops

from mindpeft.tuners.base import (
    Shapes,
    Site,
    Tensors,
    float_weight,
    is_transposed,
    original,
    weight_attribute,
    weight_matrix,
)
from mindpeft.tuners.lora_layers import LoraEmbedding, LoraLayer, LoraLinear

MAGNITUDE = "lora_magnitude_vector"
_TINY = 1e-15  # stands in for the norm of a row of zeros, which has no direction

_matmul = ops.MatMul(transpose_b=True)
_matmul_transposed = ops.MatMul(transpose_a=True, transpose_b=True)
_product = ops.MatMul()
_sum = ops.ReduceSum()
_bias_add = ops.BiasAdd()
_divide = ops.RealDiv()


class DoraLayer(LoraLayer):
    """What DoRA's layers share: the magnitudes m, one for each output."""

    def __init__(self, base_layer: nn.Cell, *slot: Any) -> None:
        super().__init__(base_layer, *slot)
        # Not as a child: the innermost base_layer is one already.
        object.__setattr__(self, "cell", original(base_layer))
        self.transposed = self.is_transposed(self.cell)

    @staticmethod
    def is_transposed(cell: nn.Cell) -> bool:
        """Whether a cell's weight is (in, out), as an embedding's (vocabulary, dim) always is."""
        return is_transposed(cell)

    @classmethod
    def tensor_shapes(cls, site: Site) -> Shapes:
        shapes = super().tensor_shapes(site)
        return {**shapes, MAGNITUDE: shapes[cls.NAMES[1]][:1]}

    @classmethod
    def initial_tensors(cls, site: Site) -> Tensors:
        tensors = super().initial_tensors(site)
        # What is taken out of the weight makes up for the product.
        product = np.float32(0) if cls.takes_out(site) else cls.product(site, tensors)
        return {**tensors, MAGNITUDE: cls.norms(site, product)}

    @classmethod
    def norms(cls, site: Site, product: np.ndarray | np.float32) -> np.ndarray:
        """|W + s B A| for each output, (out,), for the original weight and s B A."""
        return np.linalg.norm(cls.weight_of(site.cell) + product, axis=1)

    @classmethod
    def weight_of(cls, cell: nn.Cell) -> np.ndarray:
        """The original weight, (out, in), in float32."""
        return weight_matrix(cell)

    @classmethod
    def merged(cls, site: Site, weights: Tensors, tensors: Tensors, shared: Tensors | None = None) -> Tensors:
        attribute, product = weight_attribute(site.cell), cls.product(site, tensors)
        # The norm is the original weight's also where other adapters were merged before.
        factors = tensors[MAGNITUDE] / np.maximum(cls.norms(site, product), np.float32(_TINY))
        if cls.is_transposed(site.cell):
            return {attribute: (weights[attribute] + product.T) * factors}
        return {attribute: (weights[attribute] + product) * factors[:, None]}

    def factors_less_one(self, weight: ms.Tensor, a: ms.Tensor, b: ms.Tensor) -> ms.Tensor:
        """m / |W + s B A| - 1 for each output, (out,); 0 while switched off; runs inside a graph.

        The weight is in the slot's dtype.
        """
        # The square is multiplied out, |W|^2 + 2s (W A^T) B + s^2 (B A A^T) B, so that B A is never made.
        cross = _matmul_transposed(weight, a) if self.transposed else _matmul(weight, a)
        own = _product(b, _matmul(a, a))
        squares = _sum(weight * weight, 0 if self.transposed else 1)
        squares = squares + _sum((cross * 2.0 + own * self.scaling) * (b * self.scaling), 1)
        norms = ops.stop_gradient(ops.sqrt(ops.maximum(squares, _TINY**2)))
        return self.unless_off(_divide(self.lora_magnitude_vector, norms) - 1.0, ops.zeros_like(norms))


class DoraLinear(DoraLayer, LoraLinear):
    """DoRA on a linear cell: LoRA's A and B, and m (out)."""

    def construct(self, x: ms.Tensor) -> ms.Tensor:
        result = self.base_layer(x)
        total = ops.cast(result, self.slot_dtype)
        dropped = self.dropout(ops.cast(x, self.slot_dtype))
        update = self.update(dropped)
        weight = float_weight(self.cell, self.slot_dtype)
        factors = self.factors_less_one(weight, self.lora_A.weight, self.lora_B.weight)
        # Off, the update and the factors are zeros, which leave the result as it is.
        adapted = total + update + self.scale_columns(self.product_of(dropped, total) + update, factors)
        return ops.cast(adapted, result.dtype)

    def product_of(self, dropped: ms.Tensor, result: ms.Tensor) -> ms.Tensor:
        """W x without the bias; the dropout is on this x too."""
        if self.training and self.dropout.p > 0:
            weight = float_weight(self.cell, self.slot_dtype)
            if self.transposed:
                rows = _product(dropped.reshape((-1, dropped.shape[-1])), weight)
                return rows.reshape(result.shape)
            return self.linear(dropped, weight)
        if self.cell.bias is None:
            return result
        rows = result.reshape((-1, result.shape[-1]))
        return _bias_add(rows, -ops.cast(self.cell.bias, self.slot_dtype)).reshape(result.shape)


class DoraEmbedding(DoraLayer, LoraEmbedding):
    """DoRA on an embedding: LoRA's A and B, and m (dim)."""

    def __init__(self, base_layer: nn.Cell, *slot: Any) -> None:
        super().__init__(base_layer, *slot)
        self.is_classic = weight_attribute(self.cell) == "embedding_table"

    @staticmethod
    def is_transposed(cell: nn.Cell) -> bool:
        return True

    @classmethod
    def weight_of(cls, cell: nn.Cell) -> np.ndarray:
        return getattr(cell, weight_attribute(cell)).asnumpy().astype(np.float32).T

    def construct(self, ids: ms.Tensor) -> ms.Tensor:
        result = self.base_layer(ids)
        weight = self.cell.embedding_table if self.is_classic else self.cell.weight
        weight = ops.cast(weight, self.slot_dtype)
        factors = self.factors_less_one(weight, self.lora_embedding_A, self.lora_embedding_B)
        total = ops.cast(result, self.slot_dtype) + ops.reshape(self.update(ids), result.shape)
        return ops.cast(total + self.scale_columns(total, factors), result.dtype)
