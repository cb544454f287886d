"""LoHa: the delta is the element-wise product of two low-rank matrices, D = (A1 B1) * (A2 B2).

Hyeon-Woo et al. 2021, "FedPara: Low-Rank Hadamard Product for Communication-Efficient Federated Learning";
the delta has a rank of up to r^2.
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
from mindpeft.tuners.base import Shapes, Site, Tensors, TunerLayer, kaiming_uniform
from mindpeft.tuners.lycoris import LycorisConfig, LycorisConvolution, LycorisLayer, is_convolution, rebuilt

_matmul = ops.MatMul()
_tile = ops.Tile()


@register_method
@dataclass
class LoHaConfig(LycorisConfig):
    """Hugging Face PEFT's configuration of LoHa; its keys are described in ``LycorisConfig``.

    Raises:
        InputError: a value is not allowed, or keys contradict each other.
    """

    METHOD: ClassVar[PeftType] = PeftType.LOHA

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.init_weights, bool):
            raise InputError(f"init_weights must be true or false, not {self.init_weights!r}")

    def slot_class(self, cell: nn.Cell, path: str) -> type[TunerLayer]:
        return LoHaConvolution if is_convolution(cell, path, "LoHa") else LoHaLinear


class LoHaLayer(LycorisLayer):
    """A1, A2 (out, r) and B1, B2 (r, everything else)."""

    @classmethod
    def tensor_shapes(cls, site: Site) -> Shapes:
        rank, (n_out, *rest) = cls.rank_of(site), site.cell.weight.shape
        tall, wide = (n_out, rank), (rank, math.prod(rest))
        return {"hada_w1_a": tall, "hada_w1_b": wide, "hada_w2_a": tall, "hada_w2_b": wide}

    @classmethod
    def initial_tensors(cls, site: Site) -> Tensors:
        values = {name: kaiming_uniform(shape) for name, shape in cls.tensor_shapes(site).items()}
        if site.config.init_weights:
            values["hada_w2_b"][:] = 0
        return values

    @classmethod
    def delta_of(cls, site: Site, tensors: Tensors) -> np.ndarray:
        return (tensors["hada_w1_a"] @ tensors["hada_w1_b"]) * (tensors["hada_w2_a"] @ tensors["hada_w2_b"])


class LoHaLinear(LoHaLayer):
    """LoHa on a linear cell."""

    def is_whole(self) -> bool:
        (n_out, rank), n_in = self.hada_w1_a.shape, self.hada_w1_b.shape[1]
        return rank * rank * (n_in + n_out) >= n_in * n_out

    def whole_delta(self, factor: ms.Tensor) -> ms.Tensor:
        return _matmul(self.hada_w1_a, self.hada_w1_b * factor) * _matmul(self.hada_w2_a, self.hada_w2_b)

    def product(self, x: ms.Tensor, factor: ms.Tensor) -> ms.Tensor:
        if self.is_whole():
            return self.linear(x, self.whole_delta(factor))
        tall, wide = (self.hada_w1_a, self.hada_w2_a), (self.hada_w1_b, self.hada_w2_b)
        (n_out, rank), n_in = tall[0].shape, x.shape[-1]
        # The same as a product of two thin matrices, whose r^2 columns and rows are element-wise products of
        # one column (row) of each factor: D itself, as large as W, is never made.
        rows = _tile(wide[0].reshape((rank, 1, n_in)), (1, rank, 1)) * _tile(
            wide[1].reshape((1, rank, n_in)), (rank, 1, 1)
        )
        columns = _tile(tall[0].reshape((n_out, rank, 1)), (1, 1, rank)) * _tile(
            tall[1].reshape((n_out, 1, rank)), (1, rank, 1)
        )
        hidden = self.linear(x, rows.reshape((rank * rank, n_in))) * factor
        return self.linear(hidden, columns.reshape((n_out, rank * rank)))


class LoHaConvolution(LycorisConvolution, LoHaLayer):
    """LoHa on a convolution; "effective": A (r, out), B (r, in) and T (r, r, height, width), twice."""

    def __init__(self, base_layer: nn.Cell, *slot: Any) -> None:
        super().__init__(base_layer, *slot)
        self.effective = "hada_t1" in self.slot_shapes

    @classmethod
    def tensor_shapes(cls, site: Site) -> Shapes:
        if not cls.is_effective(site):
            return super().tensor_shapes(site)
        rank, (n_out, n_in, *extent) = cls.rank_of(site), site.cell.weight.shape
        one = {"t": (rank, rank, *extent), "a": (rank, n_out), "b": (rank, n_in)}
        return {
            f"hada_t{number}" if key == "t" else f"hada_w{number}_{key}": shape
            for number in (1, 2)
            for key, shape in one.items()
        }

    @classmethod
    def delta_of(cls, site: Site, tensors: Tensors) -> np.ndarray:
        if not cls.is_effective(site):
            return super().delta_of(site, tensors)
        first, second = (
            rebuilt(tensors[f"hada_t{n}"], tensors[f"hada_w{n}_a"], tensors[f"hada_w{n}_b"]) for n in (1, 2)
        )
        return first * second

    def delta(self) -> ms.Tensor:
        if self.effective:
            first = self.rebuilt(self.hada_t1, self.hada_w1_a, self.hada_w1_b)
            return first * self.rebuilt(self.hada_t2, self.hada_w2_a, self.hada_w2_b)
        return _matmul(self.hada_w1_a, self.hada_w1_b) * _matmul(self.hada_w2_a, self.hada_w2_b)
