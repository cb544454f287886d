"""RoAd: pairs of a linear cell's output features are turned and stretched.

Liao and Monz 2024, "3-in-1: 2D Rotary Adaptation for Efficient Finetuning, Efficient Batching and
Composability": z = c * y + s * turned(y) for y = W x + b, where turned(y) has (-y_j, y_i) for each pair
(y_i, y_j) and c = alpha cos(theta), s = alpha sin(theta).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import mindspore as ms
import numpy as np
from mindspore import nn, ops

from mindpeft.config import PeftType, register_method
from mindpeft.errors import InputError
from mindpeft.tuners.base import Shapes, Site, Tensors, TunerLayer, check_linear, linear_features
from mindpeft.tuners.targeted import TargetedConfig, check_choice

# The variants and how many numbers each feature has.
_NUMBERS = {"road_1": 0.5, "road_2": 1, "road_4": 2}


@register_method
@dataclass
class RoadConfig(TargetedConfig):
    """Hugging Face PEFT's configuration of RoAd, key by key.

    Attributes:
        variant: "road_1" (an angle and a factor for each pair), "road_2" (for each feature), "road_4" (for
            each feature, separate ones for c and for s).
        group_size: features that are paired with each other: the first with the first of the second half,
            and so on. Even, and a divisor of each cell's output width.
        init_weights: start with angles of 0 and factors of 1, so that nothing changes; else with random ones.
        target_modules: names or dotted suffixes of cells, or a regular expression for the full path, or
            "all-linear"; ``None`` takes the model type's default.
        modules_to_save: cells trained and saved whole (a fresh head).

    Raises:
        InputError: a value is not allowed, or keys contradict each other.
    """

    variant: str = "road_1"
    group_size: int = 64
    init_weights: bool = True

    METHOD: ClassVar[PeftType] = PeftType.ROAD

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("variant", self.variant, tuple(_NUMBERS))
        if type(self.group_size) is not int or self.group_size < 2 or self.group_size % 2:
            raise InputError(f"group_size must be an even integer, 2 or more, not {self.group_size!r}")

    def slot_class(self, cell: nn.Cell, path: str) -> type[TunerLayer]:
        check_linear(cell, path, "RoAd", transposed=False)
        n_out = linear_features(cell)[1]
        if n_out % self.group_size:
            raise InputError(
                f"group_size={self.group_size} does not divide the output's width of {path!r}, {n_out}"
            )
        return RoadLinear


class RoadLinear(TunerLayer):
    """The angles and the factors, each (out / 2), (out) or (2 out)."""

    def __init__(self, base_layer: nn.Cell, *slot: Any) -> None:
        super().__init__(base_layer, *slot)
        self.variant, self.group = "road_1", 2
        self.halves, self.join, self.tile = ops.Unstack(1), ops.Stack(1), ops.Tile()

    @classmethod
    def tensor_shapes(cls, site: Site) -> Shapes:
        size = int(linear_features(site.cell)[1] * _NUMBERS[site.config.variant])
        return {"road_theta": (size,), "road_alpha": (size,)}

    @classmethod
    def initial_tensors(cls, site: Site) -> Tensors:
        spread = 0.0 if site.config.init_weights else 0.5
        means = {"road_theta": 0.0, "road_alpha": 1.0}
        return {
            name: np.random.normal(means[name], spread, shape).astype(np.float32)
            for name, shape in cls.tensor_shapes(site).items()
        }

    @classmethod
    def holds(cls, room: Shapes, shapes: Shapes) -> bool:
        return room == shapes  # the number of angles tells the variant

    @classmethod
    def merged(cls, site: Site, weights: Tensors, tensors: Tensors, shared: Tensors | None = None) -> Tensors:
        half = site.config.group_size // 2
        theta, alpha = tensors["road_theta"], tensors["road_alpha"]
        if site.config.variant == "road_1":
            theta, alpha = (np.repeat(v.reshape(-1, 1, half), 2, axis=1).reshape(-1) for v in (theta, alpha))
        first, second = alpha * np.cos(theta), alpha * np.sin(theta)
        if site.config.variant == "road_4":
            first = first.reshape(-1, 2, 2 * half)[:, 0].reshape(-1)
            second = second.reshape(-1, 2, 2 * half)[:, 1].reshape(-1)

        def turn(value: np.ndarray) -> np.ndarray:
            rows = value.reshape(len(value), -1)
            pairs = rows.reshape(-1, 2, half, rows.shape[1])
            turned = np.stack((-pairs[:, 1], pairs[:, 0]), axis=1).reshape(rows.shape)
            return (first[:, None] * rows + second[:, None] * turned).reshape(value.shape)

        return {name: turn(weights[name]) for name in ("weight", "bias") if name in weights}

    def configure(self, config: RoadConfig, trainable: bool) -> bool:
        changed = (self.variant, self.group) != (config.variant, config.group_size)
        self.variant, self.group = config.variant, config.group_size
        return changed

    def for_each_feature(self, values: ms.Tensor, number: int) -> ms.Tensor:
        """Numbers (out) for c (``number`` 0) or for s (1), from what the variant has."""
        if self.variant == "road_1":
            return self.tile(values.reshape((-1, 1, self.group // 2)), (1, 2, 1)).reshape((-1,))
        if self.variant == "road_4":
            return values.reshape((-1, 2, self.group))[:, number].reshape((-1,))
        return values

    def construct(self, x: ms.Tensor) -> ms.Tensor:
        result = self.base_layer(x)
        y = ops.cast(result, self.slot_dtype)
        first = self.for_each_feature(self.road_alpha * ops.cos(self.road_theta), 0)
        second = self.for_each_feature(self.road_alpha * ops.sin(self.road_theta), 1)
        one, other = self.halves(y.reshape((-1, 2, self.group // 2)))
        turned = self.join((-other, one)).reshape(y.shape)
        kept = self.scale_columns(y, self.unless_off(first, ops.ones_like(first)))
        return ops.cast(kept + self.scale_columns(turned, second * self.scaling), result.dtype)
