"""What LoHa and LoKr share: config keys, rank and scaling, dropout of rows and of whole layers."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import mindspore as ms
import numpy as np
from mindspore import nn, ops

from mindpeft.ops.random import standard_normal
from mindpeft.targets import pattern_value
from mindpeft.tuners.base import Shapes, Site, Tensors, check_linear, original, refuse_cell
from mindpeft.tuners.delta import DeltaLayer
from mindpeft.tuners.targeted import TargetedConfig, check_count, check_number, check_rate


@dataclass
class LycorisConfig(TargetedConfig):
    """The keys that both methods have.

    Attributes:
        r: the rank.
        alpha: the scaling's numerator: alpha / r.
        rank_dropout: the chance of a row of the delta to be zero, while training.
        module_dropout: the chance of a layer's whole delta to be zero, while training.
        use_effective_conv2d: factorise the kernel's extent as well, for convolutions.
        exclude_modules: cells never targeted, given as ``target_modules``.
        init_weights: start with a delta of zero; else everything is random.
        layers_to_transform: only these layer indices; needs a list of targets.
        layers_pattern: the name before the layer index.
        rank_pattern: regular expression for the end of a name -> its rank.
        alpha_pattern: regular expression for the end of a name -> its alpha.
    """

    r: int = 8
    alpha: float = 8
    rank_dropout: float = 0.0
    module_dropout: float = 0.0
    use_effective_conv2d: bool = False
    exclude_modules: set[str] | list[str] | str | None = None
    init_weights: bool | str = True
    layers_to_transform: list[int] | int | None = None
    layers_pattern: list[str] | str | None = None
    rank_pattern: dict[str, int] = field(default_factory=dict)
    alpha_pattern: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.rank_pattern = self.rank_pattern or {}
        self.alpha_pattern = self.alpha_pattern or {}
        ranks = {f"rank_pattern[{key!r}]": rank for key, rank in self.rank_pattern.items()}
        for key, rank in {"r": self.r, **ranks}.items():
            check_count(key, rank)
        alphas = {f"alpha_pattern[{key!r}]": alpha for key, alpha in self.alpha_pattern.items()}
        for key, alpha in {"alpha": self.alpha, **alphas}.items():
            check_number(key, alpha)
        check_rate("rank_dropout", self.rank_dropout)
        check_rate("module_dropout", self.module_dropout)

    def roomy(self, slot_rank: int) -> LycorisConfig:
        return replace(self, r=slot_rank, rank_pattern={})


def is_convolution(cell: nn.Cell, path: str, method: str) -> bool:
    """Whether a target is a two-dimensional convolution; else it is a linear cell.

    Raises:
        InputError: it is neither.
    """
    if isinstance(cell, nn.Conv2d) and cell.data_format == "NCHW":
        return True
    if isinstance(cell, nn.Conv2d) or not hasattr(cell, "weight"):
        raise refuse_cell(cell, path, method, "linear cells and nn.Conv2d in the format NCHW")
    check_linear(cell, path, method, transposed=False)
    return False


class Kept(nn.Cell):
    """``count`` numbers, each 0 with probability ``p`` and else 1, drawn anew at each call while training."""

    def __init__(self, p: float) -> None:
        super().__init__()
        self.p = p
        self.normal = standard_normal()

    def construct(self, count: int) -> ms.Tensor:
        chance = (ops.erf(self.normal((count,)) * math.sqrt(0.5)) + 1.0) * 0.5  # uniform in [0, 1]
        return (chance >= self.p).astype(ms.float32)


class LycorisLayer(DeltaLayer):
    """A layer with a delta: y = W x + s D x."""

    FEATURES: ClassVar[int] = -1  # the axis of the output that a row of the delta makes

    def __init__(self, base_layer: nn.Cell, *slot: Any) -> None:
        super().__init__(base_layer, *slot)
        self.kept_rows, self.kept_layer = Kept(0.0), Kept(0.0)
        self.scales_rows = False

    @classmethod
    def rank_of(cls, site: Site) -> int:
        """The rank for a cell: its pattern's, or ``r``."""
        return pattern_value(site.config.rank_pattern, site.path, site.config.r)

    @classmethod
    def scaling_of(cls, site: Site) -> float:
        config = site.config
        return pattern_value(config.alpha_pattern, site.path, config.alpha) / cls.rank_of(site)

    @classmethod
    def delta_of(cls, site: Site, tensors: Tensors) -> np.ndarray:
        """D, in float32."""
        raise NotImplementedError

    @classmethod
    def merged(cls, site: Site, weights: Tensors, tensors: Tensors, shared: Tensors | None = None) -> Tensors:
        delta = cls.delta_of(site, tensors) * np.float32(cls.scaling_of(site))
        return {"weight": weights["weight"] + delta.reshape(weights["weight"].shape)}

    def configure(self, config: LycorisConfig, trainable: bool) -> bool:
        wanted = config.rank_dropout, config.module_dropout, scales_rows(config)
        changed = trainable and wanted != (self.kept_rows.p, self.kept_layer.p, self.scales_rows)
        if changed:
            self.kept_rows, self.kept_layer = Kept(config.rank_dropout), Kept(config.module_dropout)
            self.scales_rows = scales_rows(config)
        return changed

    def product(self, x: ms.Tensor, factor: ms.Tensor) -> ms.Tensor:
        """D x times ``factor``, for x in the slot's dtype; runs inside a graph."""
        raise NotImplementedError

    def is_whole(self) -> bool:
        """Whether a linear cell's product is one with the whole of D; a constant of the graph."""
        return False

    def whole_delta(self, factor: ms.Tensor) -> ms.Tensor:
        """D (out, in) times ``factor``; runs inside a graph."""
        raise NotImplementedError

    def scale_rows(self, update: ms.Tensor, factors: ms.Tensor) -> ms.Tensor:
        """The update with each row of the delta multiplied by its factor; runs inside a graph."""
        return self.scale_columns(update, factors)

    def construct(self, x: ms.Tensor) -> ms.Tensor:
        factor = self.scaling
        if self.training and self.kept_layer.p > 0:
            factor = factor * ops.cast(self.kept_layer(1), self.slot_dtype)
        drops_rows = self.training and self.kept_rows.p > 0
        if self.is_whole() and not drops_rows:
            return self.with_delta(x, self.whole_delta(factor))
        update = self.product(ops.cast(x, self.slot_dtype), factor)
        if drops_rows:
            rows = self.kept_rows(update.shape[self.FEATURES])
            if self.scales_rows:
                rows = rows * ops.reciprocal(ops.maximum(rows.mean(), 1e-6))
            update = self.scale_rows(update, ops.cast(rows, self.slot_dtype))
        return self.beside(x, update)


class LycorisConvolution(LycorisLayer):
    """A layer around ``nn.Conv2d``; its delta is made as a whole, in the shape of the weight."""

    FEATURES = 1

    def __init__(self, base_layer: nn.Cell, *slot: Any) -> None:
        super().__init__(base_layer, *slot)
        cell = original(base_layer)
        self.weight_shape, self.convolve = tuple(cell.weight.shape), cell.conv2d
        self.from_left, self.for_each_row = ops.MatMul(transpose_a=True), ops.BatchMatMul(transpose_a=True)
        self.tile = ops.Tile()

    @classmethod
    def holds(cls, room: Shapes, shapes: Shapes) -> bool:
        return room == shapes

    @classmethod
    def is_effective(cls, site: Site) -> bool:
        """Whether the kernel's extent is factorised as well."""
        return site.config.use_effective_conv2d and tuple(site.cell.weight.shape[2:]) != (1, 1)

    def delta(self) -> ms.Tensor:
        """D, of as many numbers as the weight; runs inside a graph."""
        raise NotImplementedError

    def rebuilt(self, core: ms.Tensor, left: ms.Tensor, right: ms.Tensor) -> ms.Tensor:
        """``rebuilt`` below, inside a graph, as a matrix of ``left``'s columns."""
        rank, rows, columns = core.shape[0], left.shape[1], right.shape[1]
        partly = self.from_left(left, core.reshape((rank, -1))).reshape((rows, rank, -1))
        every = self.tile(right.reshape((1, rank, columns)), (rows, 1, 1))
        return self.for_each_row(every, partly).reshape((rows, -1))

    def product(self, x: ms.Tensor, factor: ms.Tensor) -> ms.Tensor:
        return self.convolve(x, self.delta().reshape(self.weight_shape) * factor)

    def scale_rows(self, update: ms.Tensor, factors: ms.Tensor) -> ms.Tensor:
        batch, _, height, width = update.shape
        return update * self.tile(factors.reshape((1, -1, 1, 1)), (batch, 1, height, width))


def rebuilt(core: np.ndarray, left: np.ndarray, right: np.ndarray) -> np.ndarray:
    """A kernel from its Tucker form.

    Args:
        core: (r, r, height, width).
        left: (r, rows), for the core's first axis.
        right: (r, columns), for the second.

    Returns:
        (rows, columns, height, width).
    """
    return np.einsum("ijhw,ip,jq->pqhw", core, left, right)


def scales_rows(config: LycorisConfig) -> bool:
    """Whether what is left after dropping rows is scaled up: an option of LoKr, always so in LoHa."""
    return getattr(config, "rank_dropout_scale", True)
