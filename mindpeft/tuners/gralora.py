"""GraLoRA: the weight is cut into k x k blocks, each with a low-rank update of its own.

Jung et al. 2025, "GraLoRA: Granular Low-Rank Adaptation for Parameter-Efficient Fine-Tuning": block (i, j),
from the inputs' part i to the outputs' part j, is A_ij B_ji with r / k columns; A (k, in / k, r) holds A_ij
side by side for all j, and B (k, r, out / k) holds B_ji on top of each other for all i. Ordinary LoRA may act
beside it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import mindspore as ms
import numpy as np
from mindspore import nn, ops

from mindpeft.config import PeftType, register_method
from mindpeft.errors import InputError
from mindpeft.ops.attention import MergeHeads, SplitHeads
from mindpeft.ops.dropout import dropout
from mindpeft.tuners.base import (
    Shapes,
    Site,
    Tensors,
    TunerLayer,
    check_linear,
    is_transposed,
    kaiming_uniform,
    linear_features,
)
from mindpeft.tuners.targeted import TargetedConfig, check_count, check_number, check_rate

BLOCKS, GENERAL = ("gralora_A", "gralora_B"), ("gralora_A_general.weight", "gralora_B_general.weight")


@register_method
@dataclass
class GraloraConfig(TargetedConfig):
    """Hugging Face PEFT's configuration of GraLoRA, key by key.

    Attributes:
        r: the rank of a row of blocks together; a multiple of ``gralora_k``.
        hybrid_r: the rank of ordinary LoRA beside it; 0 for none.
        target_modules: names or dotted suffixes of linear cells, or a regular expression for the full path,
            or "all-linear"; ``None`` takes the model type's default.
        alpha: the scaling's numerator; the scaling is alpha / (r + hybrid_r).
        gralora_dropout: dropout on the input while training.
        gralora_k: into how many parts inputs and outputs are cut; it must divide both widths of each cell.
        fan_in_fan_out: the weights are (in, out); set from the cells themselves.
        bias: which of the base model's biases are trained: "none", "all", "gralora_only".
        modules_to_save: cells trained and saved whole (a fresh head).
        init_weights: start with B zero, so that nothing changes; else both are random.
        layers_to_transform: only these layer indices; needs a list of targets.
        layers_pattern: the name before the layer index.

    Raises:
        InputError: a value is not allowed, or keys contradict each other.
    """

    r: int = 32
    hybrid_r: int = 0
    alpha: float = 64
    gralora_dropout: float = 0.0
    gralora_k: int = 2
    fan_in_fan_out: bool = False
    bias: str = "none"
    init_weights: bool = True
    layers_to_transform: list[int] | int | None = None
    layers_pattern: list[str] | str | None = None

    METHOD: ClassVar[PeftType] = PeftType.GRALORA
    BIAS_ONLY = "gralora_only"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count("r", self.r)
        check_count("hybrid_r", self.hybrid_r, least=0)
        check_count("gralora_k", self.gralora_k)
        check_number("alpha", self.alpha)
        check_rate("gralora_dropout", self.gralora_dropout)
        if self.r % self.gralora_k:
            raise InputError(f"r={self.r} must be a multiple of gralora_k={self.gralora_k}")

    def slot_class(self, cell: nn.Cell, path: str) -> type[TunerLayer]:
        check_linear(cell, path, "GraLoRA")
        n_in, n_out = linear_features(cell)
        if n_in % self.gralora_k or n_out % self.gralora_k:
            raise InputError(
                f"gralora_k={self.gralora_k} does not divide both widths of {path!r}, {n_in} and {n_out}"
            )
        return GraloraLinear


class GraloraLinear(TunerLayer):
    """A and B of the blocks, and those of ordinary LoRA: (r', in) and (out, r')."""

    def __init__(self, base_layer: nn.Cell, *slot: Any) -> None:
        self.hybrid = False
        super().__init__(base_layer, *slot)
        self.dropout = dropout(0.0)
        self.matmul = ops.BatchMatMul()

    @classmethod
    def tensor_shapes(cls, site: Site) -> Shapes:
        config, (n_in, n_out) = site.config, linear_features(site.cell)
        parts, r, hybrid = config.gralora_k, config.r, config.hybrid_r
        blocks = (parts, n_in // parts, r), (parts, r, n_out // parts)
        shapes = dict(zip(BLOCKS, blocks, strict=True))
        return (
            shapes | dict(zip(GENERAL, ((hybrid, n_in), (n_out, hybrid)), strict=True)) if hybrid else shapes
        )

    @classmethod
    def initial_tensors(cls, site: Site) -> Tensors:
        shapes, values = cls.tensor_shapes(site), {}
        for name, shape in shapes.items():
            if site.config.init_weights and name in (BLOCKS[1], GENERAL[1]):
                values[name] = np.zeros(shape, np.float32)
            elif name in BLOCKS:  # each part as a matrix of its own, (r, in / k) or (out / k, r)
                parts = [kaiming_uniform(shape[:0:-1]).T for _ in range(shape[0])]
                values[name] = np.stack(parts)
            else:
                values[name] = kaiming_uniform(shape)
        return values

    @classmethod
    def scaling_of(cls, site: Site) -> float:
        return site.config.alpha / (site.config.r + site.config.hybrid_r)

    @classmethod
    def holds(cls, room: Shapes, shapes: Shapes) -> bool:
        return room == shapes  # the columns belong to blocks by their number

    @classmethod
    def merged(cls, site: Site, weights: Tensors, tensors: Tensors, shared: Tensors | None = None) -> Tensors:
        first, second = (tensors[name] for name in BLOCKS)
        parts, width, r = first.shape
        by_block = first.reshape(parts, width, parts, r // parts)  # from part, input, to part, column
        other = second.reshape(parts, parts, r // parts, -1)  # to part, from part, column, output
        delta = np.einsum("iwjc,jico->joiw", by_block, other).reshape(parts * other.shape[-1], parts * width)
        if GENERAL[0] in tensors:
            delta = delta + tensors[GENERAL[1]] @ tensors[GENERAL[0]]
        delta = delta * np.float32(cls.scaling_of(site))
        return {"weight": weights["weight"] + (delta.T if is_transposed(site.cell) else delta)}

    def configure(self, config: GraloraConfig, trainable: bool) -> bool:
        changed = trainable and self.dropout.p != config.gralora_dropout
        if changed:
            self.dropout = dropout(config.gralora_dropout).set_train(self.training)
        return changed

    def reserve(self, shapes: Shapes) -> bool:
        changed = super().reserve(shapes)
        self.hybrid = GENERAL[0] in self.slot_shapes
        parts = self.slot_shapes[BLOCKS[0]][0]
        self.split, self.merge = SplitHeads(parts), MergeHeads(parts)
        return changed

    def construct(self, x: ms.Tensor) -> ms.Tensor:
        result = self.base_layer(x)
        parts, width, r = self.gralora_A.shape
        value = ops.cast(x, self.slot_dtype)
        rows = self.split(self.dropout(value).reshape((1, -1, parts * width))).reshape((parts, -1, width))
        hidden = self.matmul(rows, self.gralora_A) * self.scaling  # (from part, rows, to part and column)
        hidden = ops.transpose(hidden.reshape((parts, -1, parts, r // parts)), (2, 1, 0, 3))
        update = self.matmul(hidden.reshape((parts, -1, r)), self.gralora_B)
        update = self.merge(update.reshape((1, *update.shape))).reshape(result.shape)
        if self.hybrid:
            general = self.linear(self.dropout(value), self.gralora_A_general.weight) * self.scaling
            update = update + self.linear(general, self.gralora_B_general.weight)
        return ops.cast(ops.cast(result, self.slot_dtype) + update, result.dtype)
