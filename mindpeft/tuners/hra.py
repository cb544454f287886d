"""HRA: the input goes through a chain of trained Householder reflections.

Yuan et al. 2024, "Bridging The Gap between Low-rank and Orthogonal Adaptation via Householder Reflection
Adaptation": y = W H_1 ... H_r x + b with H_i = I - 2 u_i u_i^T for unit vectors u_i. The chain is never
multiplied out: H_1 ... H_r = I - U T U^T, where T^-1 is the strict upper triangle of U^T U plus I / 2
(Joffrain et al. 2006, "Accumulating Householder transformations, revisited"). Of a convolution the weight is
reflected, each output's inputs and kernel in one row.
"""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import mindspore as ms
import numpy as np
from mindspore import nn, ops

from mindpeft.config import PeftType, register_method
from mindpeft.tuners.base import (
    Shapes,
    Site,
    Tensors,
    TunerLayer,
    check_linear,
    is_linear,
    kaiming_uniform,
    linear_features,
    refuse_cell,
)
from mindpeft.tuners.orthogonal import TurnedInput, TurnedKernel, check_convolution
from mindpeft.tuners.targeted import TargetedConfig, check_count

logger = logging.getLogger(__name__)


@register_method
@dataclass
class HRAConfig(TargetedConfig):
    """Hugging Face PEFT's configuration of HRA, key by key.

    Attributes:
        r: the number of reflections; even, for a fresh adapter that changes nothing.
        apply_GS: make the vectors orthogonal to each other first (Gram-Schmidt).
        target_modules: names or dotted suffixes of cells, or a regular expression for the full path, or
            "all-linear"; ``None`` takes the model type's default.
        exclude_modules: cells never targeted, given the same way.
        init_weights: start with pairs of equal vectors, which undo each other; else all are random. With
            ``apply_GS``, where equal vectors make no sense, or an odd r they are always random.
        layers_to_transform: only these layer indices; needs a list of targets.
        layers_pattern: the name before the layer index.
        bias: which of the base model's biases are trained: "none", "all", "hra_only".
        modules_to_save: cells trained and saved whole (a fresh head).

    Raises:
        InputError: a value is not allowed, or keys contradict each other.
    """

    r: int = 8
    apply_GS: bool = False
    exclude_modules: set[str] | list[str] | str | None = None
    init_weights: bool = True
    layers_to_transform: list[int] | int | None = None
    layers_pattern: list[str] | str | None = None
    bias: str = "none"

    METHOD: ClassVar[PeftType] = PeftType.HRA
    BIAS_ONLY = "hra_only"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count("r", self.r)

    def roomy(self, slot_rank: int) -> HRAConfig:
        return replace(self, r=slot_rank)

    def slot_class(self, cell: nn.Cell, path: str) -> type[TunerLayer]:
        if isinstance(cell, nn.Conv2d):
            check_convolution(cell, path, "HRA")
            return HRAConv2d
        if not is_linear(cell):
            raise refuse_cell(cell, path, "HRA", "linear cells with (out, in) weights and nn.Conv2d")
        check_linear(cell, path, "HRA", transposed=False)
        return HRALinear


class HRALinear(TurnedInput):
    """U (in, r), its columns of any length."""

    def __init__(self, base_layer: nn.Cell, *slot: Any) -> None:
        super().__init__(base_layer, *slot)
        self.orthogonal = False
        self.gram, self.from_right = ops.MatMul(transpose_a=True), ops.MatMul()

    @classmethod
    def tensor_shapes(cls, site: Site) -> Shapes:
        return {"hra_u": (linear_features(site.cell)[0], site.config.r)}

    @classmethod
    def initial_tensors(cls, site: Site) -> Tensors:
        width, r = cls.tensor_shapes(site)["hra_u"]
        if site.config.init_weights and r % 2 == 0 and not site.config.apply_GS:
            return {"hra_u": np.repeat(kaiming_uniform((width, r // 2)), 2, axis=1)}
        if site.config.init_weights:
            logger.warning("HRA starts with random reflections in %s: r is odd or apply_GS is set", site.path)
        return {"hra_u": kaiming_uniform((width, r))}

    @classmethod
    def rotation(cls, site: Site, tensors: Tensors) -> np.ndarray:
        u = tensors["hra_u"].astype(np.float64)
        u = u / np.linalg.norm(u, axis=0)
        gram = u.T @ u
        inverse = gram / 2 if site.config.apply_GS else np.triu(gram, 1) + np.eye(len(gram)) / 2
        chain = np.eye(len(u)) - u @ np.linalg.inv(inverse) @ u.T
        return chain.T.astype(np.float32)

    def configure(self, config: HRAConfig, trainable: bool) -> bool:
        changed = self.orthogonal != config.apply_GS
        self.orthogonal = config.apply_GS
        return changed

    def reserve(self, shapes: Shapes) -> bool:
        changed = super().reserve(shapes)
        r = self.slot_shapes["hra_u"][1]
        self.ones = ms.Tensor(np.eye(r), self.slot_dtype)
        self.upper = ms.Tensor(np.triu(np.ones((r, r)), 1), self.slot_dtype)
        return changed

    def chain(self) -> tuple[ms.Tensor, ms.Tensor]:
        """U with columns of length 1, and T; runs inside a graph."""
        # A column of zeros, which a slot's spare ones are, reflects nothing; it must not be divided by zero.
        squares = ops.square(self.hra_u).sum(0)
        spare = ops.cast(ops.equal(squares, 0.0), self.slot_dtype)
        lengths = ops.rsqrt(squares + spare).reshape((1, -1))
        u = self.hra_u * ops.tile(lengths, (self.hra_u.shape[0], 1))
        gram = self.gram(u, u)
        if self.orthogonal:
            # Reflections at orthogonal vectors are one at what they span: I - 2 U (U^T U)^-1 U^T.
            middle = (
                ops.inverse(gram + self.ones * ops.tile(spare.reshape((1, -1)), (gram.shape[0], 1))) * 2.0
            )
        else:
            middle = ops.inverse(gram * self.upper + self.ones * 0.5)
        return u, middle

    def turned(self, x: ms.Tensor) -> ms.Tensor:
        # x (I - U T U^T)^T = x - (x U) T^T U^T
        u, middle = self.chain()
        middle = self.unless_off(middle, ops.zeros_like(middle))
        seen = self.from_right(x.reshape((-1, x.shape[-1])), u)
        return x - self.linear(self.linear(seen, middle), u).reshape(x.shape)


class HRAConv2d(TurnedKernel, HRALinear):
    """U (in * height * width of the kernel, r) of a convolution."""

    @classmethod
    def tensor_shapes(cls, site: Site) -> Shapes:
        return {"hra_u": (math.prod(site.cell.weight.shape[1:]), site.config.r)}

    def turned_rows(self, rows: ms.Tensor) -> ms.Tensor:
        u, middle = self.chain()
        seen = self.from_right(self.from_right(rows, u), middle)
        return rows - self.linear(seen, u)
