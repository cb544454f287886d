"""MiSS: the input's columns are summed up to r numbers, from which a trained matrix makes the update.

Kang and Yin 2024, "MiSS: Revisiting the Trade-off in LoRA with an Efficient Shard-Sharing Structure":
y = W x + b + D^T f(x), where f(x)[k] is the sum of x[k], x[k + r], x[k + 2 r] and so on. The variant "mini"
repeats a narrow D; "bat" has a square matrix D_i for each r rows of W, and adds W_i D_i + D_i shard by shard.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import mindspore as ms
import numpy as np
from mindspore import nn, ops

from mindpeft.config import PeftType, register_method
from mindpeft.errors import InputError
from mindpeft.ops.dropout import dropout
from mindpeft.tuners.base import (
    Shapes,
    Site,
    Tensors,
    TunerLayer,
    check_linear,
    float_weight,
    kaiming_uniform,
    linear_features,
    original,
    weight_matrix,
)
from mindpeft.tuners.delta import DeltaLayer
from mindpeft.tuners.targeted import TargetedConfig, check_choice, check_count, check_rate


@register_method
@dataclass
class MissConfig(TargetedConfig):
    """Hugging Face PEFT's configuration of MiSS, key by key.

    Attributes:
        r: how many sums are made of the input; at most its width.
        miss_dropout: dropout on the input of the sums while training; "bat" has none.
        mini_r: for "mini": the columns of the matrix, a divisor of the output's width.
        target_modules: names or dotted suffixes of cells, or a regular expression for the full path, or
            "all-linear"; ``None`` takes the model type's default.
        exclude_modules: cells never targeted, given the same way.
        init_weights: ``True`` (zeros), ``False`` (random), or a variant, which starts with zeros: "bat"
            (r must divide both widths) or "mini".
        layers_to_transform: only these layer indices; needs a list of targets.
        layers_pattern: the name before the layer index.
        bias: which of the base model's biases are trained: "none", "all", "MiSS_only".
        modules_to_save: cells trained and saved whole (a fresh head).

    Raises:
        InputError: a value is not allowed, or keys contradict each other.
    """

    r: int = 64
    miss_dropout: float = 0.0
    mini_r: int = 1
    exclude_modules: set[str] | list[str] | str | None = None
    init_weights: bool | str = True
    layers_to_transform: list[int] | int | None = None
    layers_pattern: list[str] | str | None = None
    bias: str = "none"

    METHOD: ClassVar[PeftType] = PeftType.MISS
    FORMERLY: ClassVar[tuple[str, ...]] = ("BONE",)
    BIAS_ONLY = "MiSS_only"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count("r", self.r)
        check_count("mini_r", self.mini_r)
        check_rate("miss_dropout", self.miss_dropout)
        check_choice("init_weights", self.init_weights, (True, False, "bat", "mini"))

    def from_file(self, tensors: Tensors) -> Tensors:
        return {name.replace(".bone_block", ".miss_block"): value for name, value in tensors.items()}

    def slot_class(self, cell: nn.Cell, path: str) -> type[TunerLayer]:
        check_linear(cell, path, "MiSS", transposed=False)
        n_in, n_out = linear_features(cell)
        if self.r > n_in:
            raise InputError(f"r={self.r} is more than the input's width of {path!r}, which is {n_in}")
        if self.init_weights == "bat":
            if n_in % self.r or n_out % self.r:
                raise InputError(f'"bat" needs an r that divides both widths of {path!r}, {n_in} and {n_out}')
            return MissBatLinear
        if self.init_weights == "mini" and n_out % self.mini_r:
            raise InputError(f"mini_r={self.mini_r} does not divide the output's width of {path!r}, {n_out}")
        return MissLinear


class MissLayer(DeltaLayer):
    """What the variants share: one tensor, ``miss_block``."""

    @classmethod
    def initial_tensors(cls, site: Site) -> Tensors:
        (shape,) = cls.tensor_shapes(site).values()
        value = np.zeros(shape, np.float32) if site.config.init_weights else kaiming_uniform(shape)
        return {"miss_block": value}

    @classmethod
    def holds(cls, room: Shapes, shapes: Shapes) -> bool:
        return room == shapes  # another r makes other sums

    @classmethod
    def delta_of(cls, weight: np.ndarray, block: np.ndarray) -> np.ndarray:
        """What is added to a weight (out, in), for ``miss_block``."""
        raise NotImplementedError

    @classmethod
    def merged(cls, site: Site, weights: Tensors, tensors: Tensors, shared: Tensors | None = None) -> Tensors:
        # "bat" looks at the original weight, whatever other adapters act.
        weight = weight_matrix(site.cell)
        return {"weight": weights["weight"] + cls.delta_of(weight, tensors["miss_block"])}


class MissLinear(MissLayer):
    """D (r, out), or (r, mini_r) to be repeated."""

    def __init__(self, base_layer: nn.Cell, *slot: Any) -> None:
        super().__init__(base_layer, *slot)
        n_in, self.n_out = linear_features(original(base_layer))
        rank = self.slot_shapes["miss_block"][0]
        # The sums are a product with a matrix of zeros and ones: no padding, no broadcasts in the gradient.
        self.shards = ms.Tensor(np.arange(n_in) % rank == np.arange(rank)[:, None], self.slot_dtype)
        self.dropout = dropout(0.0)
        self.product, self.tile = ops.MatMul(), ops.Tile()

    @classmethod
    def tensor_shapes(cls, site: Site) -> Shapes:
        config, n_out = site.config, linear_features(site.cell)[1]
        return {"miss_block": (config.r, config.mini_r if config.init_weights == "mini" else n_out)}

    @classmethod
    def delta_of(cls, weight: np.ndarray, block: np.ndarray) -> np.ndarray:
        rows, columns = weight.shape
        sums = np.tile(block, (1, rows // block.shape[1]))
        return sums[np.arange(columns) % len(block)].T

    def configure(self, config: MissConfig, trainable: bool) -> bool:
        changed = trainable and self.dropout.p != config.miss_dropout
        if changed:
            self.dropout = dropout(config.miss_dropout).set_train(self.training)
        return changed

    def construct(self, x: ms.Tensor) -> ms.Tensor:
        sums = self.linear(self.dropout(ops.cast(x, self.slot_dtype)), self.shards) * self.scaling
        narrow = self.product(sums.reshape((-1, sums.shape[-1])), self.miss_block)
        update = self.tile(narrow, (1, self.n_out // narrow.shape[1]))
        return self.beside(x, update.reshape((*x.shape[:-1], self.n_out)))


class MissBatLinear(MissLayer):
    """D (out / r, r, r)."""

    def __init__(self, base_layer: nn.Cell, *slot: Any) -> None:
        super().__init__(base_layer, *slot)
        self.cell = original(base_layer)
        self.product, self.tile = ops.BatchMatMul(), ops.Tile()

    @classmethod
    def tensor_shapes(cls, site: Site) -> Shapes:
        rank = site.config.r
        return {"miss_block": (linear_features(site.cell)[1] // rank, rank, rank)}

    @classmethod
    def delta_of(cls, weight: np.ndarray, block: np.ndarray) -> np.ndarray:
        rank = block.shape[-1]
        shards = weight.reshape(len(block), -1, rank) @ block
        return shards.reshape(weight.shape) + np.tile(block.reshape(-1, rank), (1, weight.shape[1] // rank))

    def construct(self, x: ms.Tensor) -> ms.Tensor:
        blocks, rank, _ = self.miss_block.shape
        block = self.miss_block * self.scaling
        weight = float_weight(self.cell, self.slot_dtype)
        # r rows of W are, as they lie in memory, the rows of all its shards (of r columns) in these r rows.
        shards = self.product(weight.reshape((blocks, -1, rank)), block).reshape(weight.shape)
        repeated = self.tile(block.reshape((blocks * rank, rank)), (1, weight.shape[1] // rank))
        return self.with_delta(x, shards + repeated)
