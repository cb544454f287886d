"""RandLoRA: a full-rank sum of fixed random products, which all layers share, with trained diagonals.

Albert et al. 2025, "RandLoRA: Full-rank parameter-efficient fine-tuning of large models": the update is a sum
of n products of rank r, D = s sum_b B_b L_b A G_b with trained diagonal L_b (r) and G_b (m), where m is the
smaller of a cell's widths, n = m / r rounded up, and A (r, m) is one for all b. As PEFT multiplies them, the
product's columns are counted by (b, k) in B and by (k, b) in A: its files mean that order.
"""

from __future__ import annotations

import math
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
    SharedSlot,
    Site,
    Slot,
    Tensors,
    TunerLayer,
    check_linear,
    is_transposed,
    linear_features,
    original,
)
from mindpeft.tuners.delta import ThinLayer
from mindpeft.tuners.plan import BaseModel
from mindpeft.tuners.targeted import TargetedConfig, check_count, check_number, check_rate

BASES = ("randlora_A", "randlora_B")
_COPIES = tuple(f".{name}" for name in BASES)


@register_method
@dataclass
class RandLoraConfig(TargetedConfig):
    """Hugging Face PEFT's configuration of RandLoRA, key by key.

    Attributes:
        r: the rank of each random product; the smaller, the more numbers are trained.
        target_modules: names or dotted suffixes of linear cells, or a regular expression for the full path,
            or "all-linear"; ``None`` takes the model type's default.
        projection_prng_key: the seed of the random matrices of a fresh adapter.
        save_projection: must be true: the random matrices are in the file.
        sparse: the matrices hold -1, 0 and 1 alone, times one number; a third of the entries are not 0.
        very_sparse: likewise, but only one entry in sqrt(m) is not 0; it goes before ``sparse``.
        randlora_dropout: dropout on the input while training.
        fan_in_fan_out: the weights are (in, out); set from the cells themselves.
        randlora_alpha: the scaling's numerator; the scaling is alpha / r.
        bias: which of the base model's biases are trained: "none", "all", "randlora_only".
        modules_to_save: cells trained and saved whole (a fresh head).
        init_weights: start with L zero, so that nothing changes; else with normal numbers.
        layers_to_transform: only these layer indices; needs a list of targets.
        layers_pattern: the name before the layer index.

    Raises:
        InputError: a value is not allowed, or keys contradict each other.
    """

    r: int = 32
    projection_prng_key: int = 0
    save_projection: bool = True
    sparse: bool = False
    very_sparse: bool = False
    randlora_dropout: float = 0.0
    fan_in_fan_out: bool = False
    randlora_alpha: float = 640
    bias: str = "none"
    init_weights: bool = True
    layers_to_transform: list[int] | int | None = None
    layers_pattern: list[str] | str | None = None

    METHOD: ClassVar[PeftType] = PeftType.RANDLORA
    SHARED_PREFIX: ClassVar[str] = "base_model."
    BIAS_ONLY = "randlora_only"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count("r", self.r)
        check_count("projection_prng_key", self.projection_prng_key, least=0)
        check_number("randlora_alpha", self.randlora_alpha)
        check_rate("randlora_dropout", self.randlora_dropout)
        if not self.save_projection:
            raise InputError(
                "save_projection=False is not supported: without randlora_A and randlora_B in the file they "
                "would have to come from torch's random generator; save the adapter with save_projection=True"
            )

    def from_file(self, tensors: Tensors) -> Tensors:
        for name, value in tensors.items():
            path, _, leaf = name.rpartition(".")
            if path and leaf in BASES and leaf in tensors and not np.array_equal(value, tensors[leaf]):
                raise InputError(f"{name!r} must be a copy of {leaf!r}, and it differs")
        return {name: value for name, value in tensors.items() if not name.endswith(_COPIES)}

    def in_file(self, tensors: Tensors) -> Tensors:
        # PEFT writes, and misses when it reads, a copy for each cell.
        paths = [name.rpartition(".")[0] for name in tensors if name.endswith(".randlora_lambda")]
        copies = {f"{path}.{leaf}": tensors[self.SHARED_PREFIX + leaf] for path in paths for leaf in BASES}
        return {**tensors, **copies}

    def slot_class(self, cell: nn.Cell, path: str) -> type[TunerLayer]:
        check_linear(cell, path, "RandLoRA")
        return RandLoraLinear

    def slot_classes(self, base: BaseModel) -> dict[str, type[Slot]]:
        return {"": RandLoraBases, **super().slot_classes(base)}


class RandLoraBases(SharedSlot):
    """A (r, 1, m) and B (M, n, r) for the widest of the cells, never trained."""

    BUFFERS = frozenset(BASES)

    @classmethod
    def tensor_shapes(cls, site: Site) -> Shapes:
        widest = np.max([linear_features(cell) for cell in site.targets.values()], axis=0)
        least, most, r = int(widest.min()), int(widest.max()), site.config.r
        return {"randlora_A": (r, 1, least), "randlora_B": (most, math.ceil(least / r), r)}

    @classmethod
    def initial_tensors(cls, site: Site) -> Tensors:
        # One key gives one pair of matrices, whatever was drawn before.
        generator = np.random.default_rng(site.config.projection_prng_key)
        shapes = cls.tensor_shapes(site)
        rarity = math.sqrt(shapes["randlora_A"][2]) if site.config.very_sparse else 3
        values = {}
        for name, shape in shapes.items():
            value = generator.uniform(-1, 1, shape)
            if site.config.sparse or site.config.very_sparse:
                value = np.sign(value) * (np.abs(value) > 1 - 1 / rarity)
            spread = value.std()
            values[name] = (value / (spread if spread else 1)).astype(np.float32)
        return values

    @classmethod
    def holds(cls, room: Shapes, shapes: Shapes) -> bool:
        return room == shapes  # spare ranks would shift the columns that meet in the product


class RandLoraLinear(ThinLayer):
    """L (r, n) and G (n, m) of a linear cell."""

    def __init__(self, base_layer: nn.Cell, *slot: Any) -> None:
        super().__init__(base_layer, *slot)
        self.dropout = dropout(0.0)
        n_in, self.n_out = linear_features(original(base_layer))
        self.narrow_input = n_in <= self.n_out
        self.most = max(n_in, self.n_out)
        self.matmul, self.turned_matmul = ops.MatMul(), ops.MatMul(transpose_a=True, transpose_b=True)

    @classmethod
    def tensor_shapes(cls, site: Site) -> Shapes:
        r, least = site.config.r, min(linear_features(site.cell))
        count = math.ceil(least / r)
        return {"randlora_lambda": (r, count), "randlora_gamma": (count, least)}

    @classmethod
    def initial_tensors(cls, site: Site) -> Tensors:
        shapes = cls.tensor_shapes(site)
        first, second = shapes["randlora_lambda"], shapes["randlora_gamma"]
        if site.config.init_weights:
            diagonals, size = np.zeros(first), max(second)
        else:
            diagonals, size = np.random.standard_normal(first), max(linear_features(site.cell))
        return {
            "randlora_lambda": diagonals.astype(np.float32),
            "randlora_gamma": np.full(second, 1 / size, np.float32),
        }

    @classmethod
    def scaling_of(cls, site: Site) -> float:
        return site.config.randlora_alpha / site.config.r

    @classmethod
    def holds(cls, room: Shapes, shapes: Shapes) -> bool:
        return room == shapes

    @classmethod
    def merged(cls, site: Site, weights: Tensors, tensors: Tensors, shared: Tensors | None = None) -> Tensors:
        n_in, n_out = linear_features(site.cell)
        diagonals, gamma = tensors["randlora_lambda"], tensors["randlora_gamma"]
        count, least = gamma.shape
        first = (diagonals[:, :, None] * shared["randlora_A"][:, :, :least] * gamma).reshape(-1, least)
        second = shared["randlora_B"][: max(n_in, n_out), :count].reshape(max(n_in, n_out), -1)
        delta = second @ first if n_in <= n_out else (second @ first).T
        delta = delta * np.float32(cls.scaling_of(site))
        return {"weight": weights["weight"] + (delta.T if is_transposed(site.cell) else delta)}

    def configure(self, config: RandLoraConfig, trainable: bool) -> bool:
        changed = trainable and self.dropout.p != config.randlora_dropout
        if changed:
            self.dropout = dropout(config.randlora_dropout).set_train(self.training)
        return changed

    def narrow(self) -> ms.Tensor:
        """L_b A G_b of all b, (r n, m); runs inside a graph."""
        r, (count, least) = self.randlora_lambda.shape[0], self.randlora_gamma.shape
        # Tiled: on the CPU a broadcasting operator keeps four times its output.
        basis = ops.cast(self.shared.randlora_A, self.slot_dtype)[:, :, :least]
        diagonals = self.randlora_lambda * self.scaling
        factors = ops.tile(diagonals.reshape((r, count, 1)), (1, 1, least))
        factors = factors * ops.tile(self.randlora_gamma.reshape((1, count, least)), (r, 1, 1))
        return (factors * ops.tile(basis, (1, count, 1))).reshape((r * count, least))

    def construct(self, x: ms.Tensor) -> ms.Tensor:
        first = self.narrow()
        count = self.randlora_gamma.shape[0]
        second = ops.cast(self.shared.randlora_B, self.slot_dtype)[: self.most, :count]
        second = second.reshape((self.most, first.shape[0]))
        drops = self.training and self.dropout.p > 0
        if not drops and self.pays(x, first.shape[0], self.n_out):
            return self.with_delta(x, self.delta(first, second))
        hidden = self.dropout(ops.cast(x, self.slot_dtype))
        if self.narrow_input:
            return self.beside(x, self.linear(self.linear(hidden, first), second))
        rows = ops.matmul(ops.matmul(hidden.reshape((-1, self.most)), second), first)
        return self.beside(x, rows.reshape((*x.shape[:-1], self.n_out)))

    def delta(self, first: ms.Tensor, second: ms.Tensor) -> ms.Tensor:
        """D (out, in); runs inside a graph."""
        return self.matmul(second, first) if self.narrow_input else self.turned_matmul(first, second)
