"""LoKr: the delta is a Kronecker product of two small matrices, each of which may be of low rank in its turn.

Yeh et al. 2023, "Navigating Text-To-Image Customization: From LyCORIS Fine-Tuning to Model Evaluation":
D = kron(C1, C2) with C1 (p, m), C2 (k, n) for a weight (p k, m n).
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import mindspore as ms
import numpy as np
from mindspore import nn, ops

from mindpeft.config import PeftType, register_method
from mindpeft.errors import InputError
from mindpeft.ops.kron import KronProduct
from mindpeft.tuners.base import Shapes, Site, Tensors, TunerLayer, kaiming_uniform
from mindpeft.tuners.lycoris import LycorisConfig, LycorisConvolution, LycorisLayer, is_convolution, rebuilt
from mindpeft.tuners.targeted import check_choice

logger = logging.getLogger(__name__)

_matmul = ops.MatMul()
_tile = ops.Tile()


@register_method
@dataclass
class LoKrConfig(LycorisConfig):
    """Hugging Face PEFT's configuration of LoKr; keys that are not here are described in ``LycorisConfig``.

    Attributes:
        decompose_both: C1 may be of low rank too.
        decompose_factor: the rows and the columns of C1, where they divide; -1 for a near-square split.
        rank_dropout_scale: scale what is left after dropping rows up to the same sum.
        init_weights: ``True`` (C1 zero), "lycoris" (C2 zero), ``False`` (both random).

    Raises:
        InputError: a value is not allowed, or keys contradict each other.
    """

    decompose_both: bool = False
    decompose_factor: int = -1
    rank_dropout_scale: bool = False

    METHOD: ClassVar[PeftType] = PeftType.LOKR

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("init_weights", self.init_weights, (True, False, "lycoris"))
        factor = self.decompose_factor
        if type(factor) is not int or (factor != -1 and factor < 1):
            raise InputError(f"decompose_factor must be -1 or a positive integer, not {factor!r}")

    def as_written(self, values: Mapping[str, Any]) -> LoKrConfig:
        if "rank_dropout_scale" in values:
            return self
        if self.alpha != self.r or self.alpha_pattern:
            logger.warning(
                "the adapter is from PEFT before 0.14, whose LoKr took no notice of alpha: it is opened with "
                "alpha equal to r (PEFT since opens it with alpha=%s)",
                self.alpha,
            )
        return replace(self, alpha=self.r, alpha_pattern=dict(self.rank_pattern))

    def slot_class(self, cell: nn.Cell, path: str) -> type[TunerLayer]:
        return LoKrConvolution if is_convolution(cell, path, "LoKr") else LoKrLinear


def split(dimension: int, factor: int) -> tuple[int, int]:
    """Two factors of a dimension: ``factor`` and the rest if it divides, else the pair of the smallest sum.

    Args:
        dimension: what to split.
        factor: -1 for none; if it doesn't divide, the smaller one is at most this.

    Returns:
        (smaller, larger), but ``factor`` first if it divides.
    """
    if factor > 0 and dimension % factor == 0:
        return factor, dimension // factor
    most = dimension if factor == -1 else factor
    first = max(n for n in range(1, dimension + 1) if dimension % n == 0 and n <= most and n * n <= dimension)
    return first, dimension // first


class LoKrLayer(LycorisLayer):
    """C1 as ``lokr_w1`` (p, m) or ``lokr_w1_a`` (p, r) and ``lokr_w1_b`` (r, m); C2 alike.

    A kernel's extent belongs to the columns of C2.
    """

    SIDES: ClassVar[tuple[str, str]] = ("lokr_w1", "lokr_w2")

    def __init__(self, base_layer: nn.Cell, *slot: Any) -> None:
        self.names: tuple[str, ...] = ()
        super().__init__(base_layer, *slot)

    @classmethod
    def tensor_shapes(cls, site: Site) -> Shapes:
        config, rank = site.config, cls.rank_of(site)
        n_out, n_in, *extent = site.cell.weight.shape
        (p, k), (m, n) = (split(size, config.decompose_factor) for size in (n_out, n_in))
        thin = config.decompose_both and rank < max(p, m) / 2, rank < max(k, n) / 2
        shapes: Shapes = {}
        for name, shape, is_thin in zip(cls.SIDES, ((p, m), (k, n, *extent)), thin, strict=True):
            if is_thin:
                shapes |= {f"{name}_a": (shape[0], rank), f"{name}_b": (rank, math.prod(shape[1:]))}
            else:
                shapes[name] = shape
        return shapes

    @classmethod
    def initial_tensors(cls, site: Site) -> Tensors:
        values = {name: kaiming_uniform(shape) for name, shape in cls.tensor_shapes(site).items()}
        kind = site.config.init_weights
        zero = ("lokr_w2", "lokr_w2_b") if kind == "lycoris" else ("lokr_w1", "lokr_w1_a") if kind else ()
        return {name: value * (name not in zero) for name, value in values.items()}

    @classmethod
    def right_of(cls, tensors: Tensors) -> np.ndarray:
        """C2 as a matrix of k rows."""
        if "lokr_w2" in tensors:
            return tensors["lokr_w2"].reshape(len(tensors["lokr_w2"]), -1)
        return tensors["lokr_w2_a"] @ tensors["lokr_w2_b"]

    @classmethod
    def delta_of(cls, site: Site, tensors: Tensors) -> np.ndarray:
        whole = "lokr_w1" in tensors
        left = tensors["lokr_w1"] if whole else tensors["lokr_w1_a"] @ tensors["lokr_w1_b"]
        return np.kron(left, cls.right_of(tensors))

    def reserve(self, shapes: Shapes) -> bool:
        changed = super().reserve(shapes)
        self.names = tuple(self.slot_shapes)
        return changed

    def left(self) -> ms.Tensor:
        """C1; of the two forms that a slot may have room for, the one that is not used is zero."""
        if "lokr_w1" not in self.names:
            return _matmul(self.lokr_w1_a, self.lokr_w1_b)
        if "lokr_w1_a" not in self.names:
            return self.lokr_w1
        return self.lokr_w1 + _matmul(self.lokr_w1_a, self.lokr_w1_b)


class LoKrLinear(LoKrLayer):
    """LoKr on a linear cell."""

    def __init__(self, base_layer: nn.Cell, *slot: Any) -> None:
        super().__init__(base_layer, *slot)
        self.kron_product = KronProduct()

    @classmethod
    def holds(cls, room: Shapes, shapes: Shapes) -> bool:
        # A higher rank is only zeros more, but another split of the dimensions puts values elsewhere.
        return cls._extents(room) == cls._extents(shapes)

    @classmethod
    def _extents(cls, shapes: Shapes) -> list[tuple[int, int]]:
        return [
            shapes[name] if name in shapes else (shapes[f"{name}_a"][0], shapes[f"{name}_b"][1])
            for name in cls.SIDES
        ]

    def product(self, x: ms.Tensor, factor: ms.Tensor) -> ms.Tensor:
        # kron(C1, C2) x = C1 X C2^T for x laid out as X (m, n): the product, as large as W, is never made.
        left = self.left() * factor
        if "lokr_w2" in self.names:
            return self.kron_product(x, left, self.right())
        # kron(C1, A B) x = kron(C1, A) x' for X' = X B^T
        tokens, m = x.size // x.shape[-1], left.shape[1]
        hidden = self.linear(x.reshape((tokens * m, x.shape[-1] // m)), self.lokr_w2_b)
        return self.kron_product(hidden.reshape((*x.shape[:-1], m * hidden.shape[1])), left, self.lokr_w2_a)

    def right(self) -> ms.Tensor:
        """C2, in a slot that has room for it as a whole."""
        if "lokr_w2_a" not in self.names:
            return self.lokr_w2
        return self.lokr_w2 + _matmul(self.lokr_w2_a, self.lokr_w2_b)


class LoKrConvolution(LycorisConvolution, LoKrLayer):
    """LoKr on a convolution; "effective": a thin C2 is A (r, k), B (r, n), T (r, r, height, width)."""

    @classmethod
    def tensor_shapes(cls, site: Site) -> Shapes:
        shapes = super().tensor_shapes(site)
        if cls.is_effective(site) and "lokr_w2_a" in shapes:
            (k, rank), extent = shapes["lokr_w2_a"], site.cell.weight.shape[2:]
            n = shapes["lokr_w2_b"][1] // math.prod(extent)
            shapes |= {"lokr_w2_a": (rank, k), "lokr_w2_b": (rank, n), "lokr_t2": (rank, rank, *extent)}
        return shapes

    @classmethod
    def right_of(cls, tensors: Tensors) -> np.ndarray:
        if "lokr_t2" not in tensors:
            return super().right_of(tensors)
        kernel = rebuilt(tensors["lokr_t2"], tensors["lokr_w2_a"], tensors["lokr_w2_b"])
        return kernel.reshape(len(kernel), -1)

    def right(self) -> ms.Tensor:
        """C2 as a matrix of k rows; runs inside a graph."""
        if "lokr_w2" in self.names:
            return self.lokr_w2.reshape((self.lokr_w2.shape[0], -1))
        if "lokr_t2" in self.names:
            return self.rebuilt(self.lokr_t2, self.lokr_w2_a, self.lokr_w2_b)
        return _matmul(self.lokr_w2_a, self.lokr_w2_b)

    def delta(self) -> ms.Tensor:
        left, right = self.left(), self.right()
        (p, m), (k, rest) = left.shape, right.shape
        left = _tile(left.reshape((p, 1, m, 1)), (1, k, 1, rest))
        return left * _tile(right.reshape((1, k, 1, rest)), (p, 1, m, 1))
