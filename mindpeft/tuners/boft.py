"""BOFT: the input is turned block by block, and each feature of the product has a trained factor.

Liu et al. 2023, "Parameter-Efficient Orthogonal Finetuning via Butterfly Factorization", with one butterfly
factor: y = s * (W (x R)) + b, where each block of R is (I - S) (I + S)^-1 with S = (A - A^T) / 2.
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
from mindpeft.ops.columns import every_row
from mindpeft.tuners.base import (
    Shapes,
    Site,
    Tensors,
    TunerLayer,
    check_linear,
    is_linear,
    original,
    refuse_cell,
)
from mindpeft.tuners.orthogonal import (
    BlockRotation,
    TurnedBlocks,
    TurnedKernel,
    block_diagonal,
    cayley,
    cayley_of,
    check_convolution,
)
from mindpeft.tuners.targeted import TargetedConfig, check_count, check_rate


@register_method
@dataclass
class BOFTConfig(TargetedConfig):
    """Hugging Face PEFT's configuration of BOFT, key by key.

    Attributes:
        boft_block_size: the columns of a block, a divisor of each cell's width; or 0.
        boft_block_num: the number of blocks, a divisor of each cell's width; or 0.
        boft_n_butterfly_factor: must be 1.
        target_modules: names or dotted suffixes of cells, or a regular expression for the full path, or
            "all-linear"; ``None`` takes the model type's default.
        exclude_modules: cells never targeted, given the same way.
        boft_dropout: the share of blocks that are not turned, at each step of training.
        fan_in_fan_out: kept for the format; (in, out) weights are not supported.
        bias: which of the base model's biases are trained: "none", "all", "boft_only".
        modules_to_save: cells trained and saved whole (a fresh head).
        init_weights: start with no rotation and factors of 1; else with random ones.
        layers_to_transform: only these layer indices; needs a list of targets.
        layers_pattern: the name before the layer index.

    Raises:
        InputError: a value is not allowed, or keys contradict each other.
    """

    boft_block_size: int = 4
    boft_block_num: int = 0
    boft_n_butterfly_factor: int = 1
    exclude_modules: set[str] | list[str] | str | None = None
    boft_dropout: float = 0.0
    fan_in_fan_out: bool = False
    bias: str = "none"
    init_weights: bool = True
    layers_to_transform: list[int] | int | None = None
    layers_pattern: list[str] | str | None = None

    METHOD: ClassVar[PeftType] = PeftType.BOFT
    BIAS_ONLY = "boft_only"

    def __post_init__(self) -> None:
        super().__post_init__()
        size, number = self.boft_block_size, self.boft_block_num
        check_count("boft_block_size", size, least=0)
        check_count("boft_block_num", number, least=0)
        if (size == 0) == (number == 0):
            raise InputError(
                f"exactly one of boft_block_size and boft_block_num must be 0, not {size!r} and {number!r}"
            )
        if self.boft_n_butterfly_factor != 1:
            raise InputError(
                f"boft_n_butterfly_factor={self.boft_n_butterfly_factor!r} is not supported; only 1 is, "
                "which is what PEFT makes of any value where it can't compile its CUDA extension"
            )
        check_rate("boft_dropout", self.boft_dropout)

    def from_file(self, tensors: Tensors) -> Tensors:
        """Without the permutations that PEFT before 0.14 saved too: of one factor, they permute nothing."""
        permutations = {name for name in tensors if name.endswith(".boft_P")}
        for name in sorted(permutations):
            if not np.array_equal(tensors[name], np.eye(tensors[name].shape[-1])[None]):
                raise InputError(f"{name!r} permutes columns, which no adapter of one butterfly factor does")
        return {name: value for name, value in tensors.items() if name not in permutations}

    def slot_class(self, cell: nn.Cell, path: str) -> type[TunerLayer]:
        if isinstance(cell, nn.Conv2d):
            check_convolution(cell, path, "BOFT")
        elif not is_linear(cell):
            raise refuse_cell(cell, path, "BOFT", "linear cells with (out, in) weights and nn.Conv2d")
        else:
            check_linear(cell, path, "BOFT", transposed=False)
        key = "boft_block_num" if self.boft_block_num else "boft_block_size"
        width, divisor = turned_width(cell), getattr(self, key)
        if width % divisor:
            raise InputError(f"{key}={divisor} does not divide the width of {path!r}, which is {width}")
        return BOFTConv2d if isinstance(cell, nn.Conv2d) else BOFTLinear


def turned_width(cell: nn.Cell) -> int:
    """How many columns are turned: the numbers that a row of the weight holds."""
    return math.prod(cell.weight.shape[1:])


class BOFTLinear(TurnedBlocks):
    """A (1, blocks, size, size) and s (out, 1)."""

    RATE = "boft_dropout"

    def __init__(self, base_layer: nn.Cell, *slot: Any) -> None:
        super().__init__(base_layer, *slot)
        self.biased = getattr(original(base_layer), "bias", None) is not None
        self.cell = original(base_layer)

    @classmethod
    def tensor_shapes(cls, site: Site) -> Shapes:
        width, n_out = turned_width(site.cell), site.cell.weight.shape[0]
        blocks = site.config.boft_block_num or width // site.config.boft_block_size
        size = width // blocks
        return {"boft_R": (1, blocks, size, size), "boft_s": (n_out, 1)}

    @classmethod
    def initial_tensors(cls, site: Site) -> Tensors:
        turns, factors = cls.tensor_shapes(site).values()
        if site.config.init_weights:
            values = np.zeros(turns), np.ones(factors)
        else:
            values = np.random.normal(0, 0.1, turns), np.random.normal(1, 0.1, factors)
        return {
            name: value.astype(np.float32) for name, value in zip(("boft_R", "boft_s"), values, strict=True)
        }

    @classmethod
    def rotation(cls, site: Site, tensors: Tensors) -> np.ndarray:
        value = tensors["boft_R"][0]
        matrices = cayley_of((value - value.transpose(0, 2, 1)) / 2)
        return block_diagonal(matrices, turned_width(site.cell))

    @classmethod
    def merged(cls, site: Site, weights: Tensors, tensors: Tensors, shared: Tensors | None = None) -> Tensors:
        turned = super().merged(site, weights, tensors, shared)
        return {"weight": turned["weight"] * tensors["boft_s"]}

    def reserve(self, shapes: Shapes) -> bool:
        changed = super().reserve(shapes)
        _, blocks, size, _ = self.slot_shapes["boft_R"]
        self.rotate = BlockRotation(blocks, size, self.slot_dtype)
        return changed

    def blocks(self) -> ms.Tensor:
        value = self.boft_R[0]
        return cayley((value - ops.transpose(value, (0, 2, 1))) * 0.5)

    def construct(self, x: ms.Tensor) -> ms.Tensor:
        result = self.base_layer(self.turned_input(x))
        factors = self.unless_off(self.boft_s, ops.ones_like(self.boft_s)).reshape((-1,))
        scaled = self.scale_columns(ops.cast(result, self.slot_dtype), factors)
        if self.biased:  # s * (y - b) + b
            bias = ops.cast(self.cell.bias, self.slot_dtype)
            scaled = scaled + every_row(bias * (1.0 - factors), scaled)
        return ops.cast(scaled, result.dtype)


class BOFTConv2d(TurnedKernel, BOFTLinear):
    """A (1, blocks, size, size) and s (1, out) of a convolution; the factors are the weight's alone."""

    @classmethod
    def tensor_shapes(cls, site: Site) -> Shapes:
        shapes = super().tensor_shapes(site)
        return {**shapes, "boft_s": shapes["boft_s"][::-1]}

    @classmethod
    def merged(cls, site: Site, weights: Tensors, tensors: Tensors, shared: Tensors | None = None) -> Tensors:
        return super().merged(site, weights, {**tensors, "boft_s": tensors["boft_s"].T}, shared)

    def turned_rows(self, rows: ms.Tensor) -> ms.Tensor:
        matrices = self.dropped(self.blocks())
        turned = self.rotate(rows, ops.transpose(matrices, (0, 2, 1)))
        return turned * ops.tile(self.boft_s.reshape((-1, 1)), (1, rows.shape[1]))
