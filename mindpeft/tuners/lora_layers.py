"""The layers of LoRA: a frozen matrix plus a trained product of two thin ones, y = W x + s B A x.

Hu et al. 2021, "LoRA: Low-Rank Adaptation of Large Language Models"; s = alpha / r, or alpha / sqrt(r) for
rank-stabilised LoRA (Kalajdzievski 2023).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

import mindspore as ms
import numpy as np
from mindspore import nn, ops

from mindpeft.errors import InputError
from mindpeft.nn.linear import Conv1D, Linear
from mindpeft.ops.cpu import kernels_on
from mindpeft.ops.cpu.dropout import Noise
from mindpeft.ops.cpu.linear import WEIGHT_TYPES, LoraBiasKernel, LoraKernel
from mindpeft.ops.dropout import dropout
from mindpeft.precision import needs_widening
from mindpeft.targets import pattern_value
from mindpeft.tuners.base import (
    Shapes,
    Site,
    Tensors,
    TunerLayer,
    is_transposed,
    kaiming_uniform,
    linear_features,
    weight_attribute,
    weight_matrix,
)
from mindpeft.tuners.loftq import has_rows, loftq
from mindpeft.tuners.lora_init import pair_of_weight, random_pair, takes_out

if TYPE_CHECKING:
    from mindpeft.tuners.lora import LoraConfig


class LoraLayer(TunerLayer):
    """What LoRA's linear and embedding layers share: rank, scaling, and the names of A and B."""

    NAMES: ClassVar[tuple[str, str]]

    @classmethod
    def rank_of(cls, site: Site) -> int:
        """The rank for a cell: its pattern's, or ``r``."""
        return pattern_value(site.config.rank_pattern, site.path, site.config.r)

    @classmethod
    def scaling_of(cls, site: Site) -> float:
        return site.config.scaling_at(site.path, cls.rank_of(site))

    @classmethod
    def takes_out(cls, site: Site) -> bool:
        return takes_out(site.config.init_lora_weights)

    @classmethod
    def product(cls, site: Site, tensors: Tensors) -> np.ndarray:
        """s B A, (out, in), in float32."""
        a, b = (tensors[name].astype(np.float32) for name in cls.NAMES)
        return (b @ a) * np.float32(cls.scaling_of(site))


class LoraLinear(LoraLayer):
    """LoRA on a linear cell: A (r, in), B (out, r), optionally B's bias (out)."""

    NAMES = ("lora_A.weight", "lora_B.weight")
    BIAS = "lora_B.bias"

    def __init__(self, base_layer: nn.Cell, *slot: Any) -> None:
        self.biased = False
        super().__init__(base_layer, *slot)
        self.dropout = dropout(0.0)
        self.kernel = None
        if type(self) is LoraLinear:
            self.join()

    def join(self) -> None:
        """Take the kernel for layer and pair together, where there is one."""
        base = self.base_layer
        if type(base) in (Linear, Conv1D) and kernels_on():
            kernel = LoraKernel if base.bias is None else LoraBiasKernel
            self.kernel = kernel(is_transposed(base), needs_widening(base.weight.dtype))
            self.noise = Noise(0.0)

    @classmethod
    def tensor_shapes(cls, site: Site) -> Shapes:
        rank, (n_in, n_out) = cls.rank_of(site), linear_features(site.cell)
        shapes = dict(zip(cls.NAMES, ((rank, n_in), (n_out, rank)), strict=True))
        return {**shapes, cls.BIAS: (n_out,)} if site.config.lora_bias else shapes

    @classmethod
    def initial_tensors(cls, site: Site) -> Tensors:
        kind, rank, (n_in, n_out) = (
            site.config.init_lora_weights,
            cls.rank_of(site),
            linear_features(site.cell),
        )
        if kind == "loftq":
            pair = cls.quantised(site)[1]
        elif takes_out(kind):
            pair = pair_of_weight(kind, weight_matrix(site.cell), rank, cls.scaling_of(site))
        else:
            pair = random_pair(kind, n_in, n_out, rank)
        values = dict(zip(cls.NAMES, pair, strict=True))
        if site.config.lora_bias:
            values[cls.BIAS] = np.zeros(n_out) if kind else kaiming_uniform((n_out, rank))[:, 0]
        return {name: value.astype(np.float32) for name, value in values.items()}

    @classmethod
    def quantised(cls, site: Site) -> tuple[np.ndarray, tuple[np.ndarray, np.ndarray]]:
        """LoftQ's weight (out, in), A and B."""
        config, weight = site.config.loftq_config, weight_matrix(site.cell)
        rows = has_rows(site.config.peft_version)
        return loftq(weight, cls.rank_of(site), config.loftq_bits, config.loftq_iter, rows)

    @classmethod
    def beginning(cls, site: Site, fresh: Tensors | None) -> Tensors:
        if site.config.init_lora_weights == "loftq":
            return {"lost": weight_matrix(site.cell) - cls.quantised(site)[0]}
        return super().beginning(site, fresh)

    @classmethod
    def taken_out(cls, site: Site, initial: Tensors) -> Tensors:
        if "lost" in initial:
            return {"weight": initial["lost"]}
        product = cls.product(site, initial)
        return {"weight": product.T if is_transposed(site.cell) else product}

    @classmethod
    def merged(cls, site: Site, weights: Tensors, tensors: Tensors, shared: Tensors | None = None) -> Tensors:
        product = cls.product(site, tensors)
        result = {"weight": weights["weight"] + (product.T if is_transposed(site.cell) else product)}
        if cls.BIAS in tensors:
            result["bias"] = weights["bias"] + tensors[cls.BIAS] * np.float32(cls.scaling_of(site))
        return result

    @classmethod
    def check_merge(cls, site: Site) -> None:
        if site.config.lora_bias and getattr(site.cell, "bias", None) is None:
            raise InputError("an adapter with lora_bias can't be merged into a linear cell without a bias")

    def configure(self, config: LoraConfig, trainable: bool) -> bool:
        changed = trainable and self.dropout.p != config.lora_dropout
        if changed:
            self.dropout = dropout(config.lora_dropout).set_train(self.training)
            if self.kernel is not None:
                self.noise = Noise(config.lora_dropout).set_train(self.training)
        return changed

    def reserve(self, shapes: Shapes) -> bool:
        changed = super().reserve(shapes)
        self.biased = self.BIAS in self.slot_shapes
        return changed

    def update(self, x: ms.Tensor) -> ms.Tensor:
        """s B A x, for the input after dropout, in the slot's dtype; runs inside a graph."""
        # The scaling goes where the numbers are fewest: on the r columns between A and B.
        hidden = self.linear(x, self.lora_A.weight) * self.scaling
        if self.biased:
            return self.linear(hidden, self.lora_B.weight, self.lora_B.bias * self.scaling)
        return self.linear(hidden, self.lora_B.weight)

    def pair(self) -> tuple[ms.Tensor, ms.Tensor]:
        """A (r, in) and B (out, r) of the update s B A x; runs inside a graph."""
        return self.lora_A.weight, self.lora_B.weight

    def joined(self, x: ms.Tensor) -> ms.Tensor:
        """Both in one kernel; runs inside a graph."""
        base, pair = self.base_layer, self.pair()
        if base.bias is None:
            return self.kernel(x, base.weight, *pair, self.scaling, self.noise())[0]
        bias = ops.cast(base.bias, ms.float32)
        return self.kernel(x, base.weight, *pair, self.scaling, self.noise(), bias)[0]

    def is_joined(self, x: ms.Tensor) -> bool:
        """Whether one kernel does it all; a constant of the graph."""
        if self.kernel is None or self.biased:
            return False
        floats = x.dtype == ms.float32 and self.slot_dtype == ms.float32
        return floats and self.base_layer.weight.dtype in WEIGHT_TYPES

    def construct(self, x: ms.Tensor) -> ms.Tensor:
        if self.is_joined(x):
            return self.joined(x)
        result = self.base_layer(x)
        update = self.update(self.dropout(ops.cast(x, self.slot_dtype)))
        return ops.cast(ops.cast(result, self.slot_dtype) + update, result.dtype)


class LoraEmbedding(LoraLayer):
    """LoRA on an embedding: A (r, vocabulary), B (dim, r); looks up A's columns, never the whole product."""

    NAMES = ("lora_embedding_A", "lora_embedding_B")

    def __init__(self, base_layer: nn.Cell, *slot: Any) -> None:
        super().__init__(base_layer, *slot)
        padding = getattr(base_layer, "padding_idx", None)
        self.padding = -1 if padding is None else padding
        self.matmul = ops.MatMul(transpose_a=True, transpose_b=True)

    @classmethod
    def tensor_shapes(cls, site: Site) -> Shapes:
        rank = cls.rank_of(site)
        vocabulary, dim = getattr(site.cell, weight_attribute(site.cell)).shape
        return dict(zip(cls.NAMES, ((rank, vocabulary), (dim, rank)), strict=True))

    @classmethod
    def takes_out(cls, site: Site) -> bool:
        return False  # as in PEFT, an embedding's A and B begin as ordinary LoRA's

    @classmethod
    def initial_tensors(cls, site: Site) -> Tensors:
        shapes = cls.tensor_shapes(site)
        values = {name: np.random.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}
        if site.config.init_lora_weights:
            values[cls.NAMES[0]][:] = 0
        return values

    @classmethod
    def merged(cls, site: Site, weights: Tensors, tensors: Tensors, shared: Tensors | None = None) -> Tensors:
        attribute = weight_attribute(site.cell)
        return {attribute: weights[attribute] + cls.product(site, tensors).T}

    def update(self, ids: ms.Tensor) -> ms.Tensor:
        """The rows of s (B A)^T for some ids, (ids, dim), in the slot's dtype; runs inside a graph."""
        flat = ops.reshape(ids, (-1,))
        columns = ops.gather(self.lora_embedding_A, flat, 1)  # (r, tokens)
        if self.padding >= 0:
            # As in torch, the padding token's column gets no gradient.
            columns = ops.select(ops.equal(flat, self.padding), ops.stop_gradient(columns), columns)
        return self.matmul(columns * self.scaling, self.lora_embedding_B)

    def construct(self, ids: ms.Tensor) -> ms.Tensor:
        result = self.base_layer(ids)
        update = ops.reshape(self.update(ids), result.shape)
        return ops.cast(ops.cast(result, self.slot_dtype) + update, result.dtype)
