"""DeLoRA: a low-rank update whose columns have length 1, times one trained strength.

Bini et al. 2025, "DeLoRA: Decoupling Angles and Strength in Low-rank Adaptation":
D = B diag(l / (r |A_i| |B_i|)) A diag(w), where A_i is a row of A, B_i a column of B, l is trained, and w
holds the lengths of the weight's columns when the adapter was made.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import mindspore as ms
import numpy as np
from mindspore import nn, ops

from mindpeft.config import PeftType, register_method
from mindpeft.ops.dropout import dropout
from mindpeft.targets import pattern_value
from mindpeft.tuners.base import (
    Shapes,
    Site,
    Tensors,
    TunerLayer,
    check_linear,
    kaiming_uniform,
    linear_features,
    weight_matrix,
)
from mindpeft.tuners.targeted import TargetedConfig, check_count, check_number, check_rate

_LEAST = 1e-4  # lengths count as at least that


@register_method
@dataclass
class DeloraConfig(TargetedConfig):
    """Hugging Face PEFT's configuration of DeLoRA, key by key.

    Attributes:
        r: the rank.
        delora_lambda: what the strength starts with.
        module_dropout: dropout on the input while training.
        target_modules: names or dotted suffixes of cells, or a regular expression for the full path, or
            "all-linear"; ``None`` takes the model type's default.
        exclude_modules: cells never targeted, given the same way.
        bias: which of the base model's biases are trained: "none", "all", "delora_only".
        init_weights: start with B zero, so that nothing changes; else both are random.
        layers_to_transform: only these layer indices; needs a list of targets.
        layers_pattern: the name before the layer index.
        rank_pattern: regular expression for the end of a name -> its rank.
        lambda_pattern: regular expression for the end of a name -> its ``delora_lambda``.
        modules_to_save: cells trained and saved whole (a fresh head).

    Raises:
        InputError: a value is not allowed, or keys contradict each other.
    """

    r: int = 8
    delora_lambda: float = 15
    module_dropout: float = 0.0
    exclude_modules: set[str] | list[str] | str | None = None
    bias: str = "none"
    init_weights: bool = True
    layers_to_transform: list[int] | int | None = None
    layers_pattern: list[str] | str | None = None
    rank_pattern: dict[str, int] = field(default_factory=dict)
    lambda_pattern: dict[str, float] = field(default_factory=dict)

    METHOD: ClassVar[PeftType] = PeftType.DELORA
    BIAS_ONLY = "delora_only"

    def __post_init__(self) -> None:
        super().__post_init__()
        self.rank_pattern, self.lambda_pattern = self.rank_pattern or {}, self.lambda_pattern or {}
        ranks = {f"rank_pattern[{key!r}]": rank for key, rank in self.rank_pattern.items()}
        for key, rank in {"r": self.r, **ranks}.items():
            check_count(key, rank)
        strengths = {f"lambda_pattern[{key!r}]": value for key, value in self.lambda_pattern.items()}
        for key, value in {"delora_lambda": self.delora_lambda, **strengths}.items():
            check_number(key, value)
        check_rate("module_dropout", self.module_dropout)

    def roomy(self, slot_rank: int) -> DeloraConfig:
        return replace(self, r=slot_rank, rank_pattern={})

    def slot_class(self, cell: nn.Cell, path: str) -> type[TunerLayer]:
        check_linear(cell, path, "DeLoRA", transposed=False)
        return DeloraLinear


class DeloraLinear(TunerLayer):
    """A (r, in), B (out, r), l (1), and w (in), which is never trained."""

    BUFFERS = frozenset({"delora_w_norm"})

    def __init__(self, base_layer: nn.Cell, *slot: Any) -> None:
        super().__init__(base_layer, *slot)
        self.dropout = dropout(0.0)

    @classmethod
    def rank_of(cls, site: Site) -> int:
        """The rank for a cell: its pattern's, or ``r``."""
        return pattern_value(site.config.rank_pattern, site.path, site.config.r)

    @classmethod
    def tensor_shapes(cls, site: Site) -> Shapes:
        rank, (n_in, n_out) = cls.rank_of(site), linear_features(site.cell)
        return {
            "delora_A": (rank, n_in),
            "delora_B": (n_out, rank),
            "delora_lambda": (1,),
            "delora_w_norm": (n_in,),
        }

    @classmethod
    def initial_tensors(cls, site: Site) -> Tensors:
        shapes, config = cls.tensor_shapes(site), site.config
        strength = pattern_value(config.lambda_pattern, site.path, config.delora_lambda)
        second = shapes["delora_B"]
        return {
            "delora_A": kaiming_uniform(shapes["delora_A"]),
            "delora_B": np.zeros(second, np.float32) if config.init_weights else kaiming_uniform(second),
            "delora_lambda": np.array([strength], np.float32),
            "delora_w_norm": np.linalg.norm(weight_matrix(site.cell), axis=0),
        }

    @classmethod
    def scaling_of(cls, site: Site) -> float:
        return 1 / cls.rank_of(site)

    @classmethod
    def merged(cls, site: Site, weights: Tensors, tensors: Tensors, shared: Tensors | None = None) -> Tensors:
        first, second = tensors["delora_A"], tensors["delora_B"]
        lengths = [np.linalg.norm(matrix, axis=axis) for matrix, axis in ((first, 1), (second, 0))]
        one, other = (np.maximum(length, np.float32(_LEAST)) for length in lengths)
        strengths = tensors["delora_lambda"] * np.float32(cls.scaling_of(site)) / (one * other)
        return {"weight": weights["weight"] + (second * strengths) @ first * tensors["delora_w_norm"]}

    def configure(self, config: DeloraConfig, trainable: bool) -> bool:
        changed = trainable and self.dropout.p != config.module_dropout
        if changed:
            self.dropout = dropout(config.module_dropout).set_train(self.training)
        return changed

    def construct(self, x: ms.Tensor) -> ms.Tensor:
        result = self.base_layer(x)
        seen = self.scale_columns(self.dropout(ops.cast(x, self.slot_dtype)), self.delora_w_norm)
        lengths = length_of(self.delora_A, 1) * length_of(self.delora_B, 0)
        strength = ops.tile(self.delora_lambda * self.scaling, (lengths.shape[0],))
        hidden = self.scale_columns(self.linear(seen, self.delora_A), strength * ops.reciprocal(lengths))
        update = self.linear(hidden, self.delora_B)
        return ops.cast(ops.cast(result, self.slot_dtype) + update, result.dtype)


def length_of(matrix: ms.Tensor, axis: int) -> ms.Tensor:
    """The lengths of rows (axis 1) or columns (axis 0), at least 1e-4; runs inside a graph."""
    squares = ops.square(matrix).sum(axis)
    # The root's gradient is infinite at 0, and a fresh B is 0: short vectors take the bound's path alone.
    short = squares < _LEAST * _LEAST
    return ops.select(
        short, ops.full_like(squares, _LEAST), ops.sqrt(ops.select(short, ops.ones_like(squares), squares))
    )
