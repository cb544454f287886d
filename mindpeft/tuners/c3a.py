"""C3A: the delta is made of blocks, each a circulant matrix of one trained vector.

Chen et al. 2025, "Parameter-Efficient Fine-Tuning via Circular Convolution": with blocks of size b, a cell's
output k of block m gains sum over the blocks n and their inputs j of w[m, n, (j - k) mod b] x[n, j] / in.

PEFT 0.21 works out the same outputs and the same gradient of w, but passes a wrong gradient on to the input
(that of w[m, n, (j + k) mod b]), so that it trains the layers below otherwise; here it is the true one.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any, ClassVar

import mindspore as ms
import numpy as np
from mindspore import nn, ops

from mindpeft.config import PeftType, register_method
from mindpeft.errors import InputError
from mindpeft.targets import LORA_TARGETS
from mindpeft.tuners.base import Shapes, Site, Tensors, TunerLayer, check_linear, linear_features
from mindpeft.tuners.delta import DeltaLayer
from mindpeft.tuners.targeted import TargetedConfig, check_choice, check_count

_INITIAL = ("gaussian", "kaiming_uniform", "xavier_uniform")


@register_method
@dataclass
class C3AConfig(TargetedConfig):
    """Hugging Face PEFT's configuration of C3A, key by key.

    Attributes:
        block_size: of the square blocks; it must divide the input's and the output's width of each cell.
        target_modules: names or dotted suffixes of linear cells, or a regular expression for the full path,
            or "all-linear"; ``None`` takes the model type's default.
        bias: which of the base model's biases are trained: "none", "all", "c3a_only".
        modules_to_save: cells trained and saved whole (a fresh head).
        layers_to_transform: only these layer indices; needs a list of targets.
        layers_pattern: the name before the layer index.
        block_size_pattern: regular expression for what follows a dot to the end of a name, or a full name ->
            its ``block_size``.
        init_weights: "xavier_uniform" (false means the same), "kaiming_uniform" or "gaussian"; true starts
            with zeros, so that nothing changes.

    Raises:
        InputError: a value is not allowed, or keys contradict each other.
    """

    block_size: int = 256
    bias: str = "none"
    layers_to_transform: list[int] | int | None = None
    layers_pattern: list[str] | str | None = None
    block_size_pattern: dict[str, int] = field(default_factory=dict)
    init_weights: bool | str = "xavier_uniform"

    METHOD: ClassVar[PeftType] = PeftType.C3A
    EXAMPLE: ClassVar = {"block_size": 64}
    DEFAULT_TARGETS: ClassVar = {**LORA_TARGETS, "gpt2": ["mlp.c_proj"], "gpt_bigcode": ["mlp.c_proj"]}
    BIAS_ONLY = "c3a_only"

    def __post_init__(self) -> None:
        super().__post_init__()
        self.block_size_pattern = self.block_size_pattern or {}
        sizes = {f"block_size_pattern[{key!r}]": size for key, size in self.block_size_pattern.items()}
        for key, size in {"block_size": self.block_size, **sizes}.items():
            check_count(key, size)
        if not isinstance(self.init_weights, bool):
            check_choice("init_weights", self.init_weights, _INITIAL)

    def size_for(self, path: str) -> int:
        """A cell's block size; like PEFT, a pattern must match from a dot on, or be the full name."""
        patterns = self.block_size_pattern
        key = next((key for key in patterns if re.match(rf".*\.{key}$", path)), path)
        return patterns.get(key, self.block_size)

    def slot_class(self, cell: nn.Cell, path: str) -> type[TunerLayer]:
        check_linear(cell, path, "C3A", transposed=False)
        size, (n_in, n_out) = self.size_for(path), linear_features(cell)
        if n_in % size or n_out % size:
            raise InputError(
                f"block_size={size} does not divide both widths of {path!r}, {n_in} and {n_out}; the largest "
                f"that does is {np.gcd(n_in, n_out)}"
            )
        return C3ALinear


class C3ALinear(DeltaLayer):
    """w (out / b, in / b, b)."""

    def __init__(self, base_layer: nn.Cell, *slot: Any) -> None:
        super().__init__(base_layer, *slot)
        rows, columns, size = self.slot_shapes["c3a_kernel"]
        self.shape = (rows * size, columns * size)
        places = np.arange(rows * columns * size).reshape(rows, columns, size)
        self.places = ms.Tensor(circulant(places).reshape(-1), ms.int32)

    @classmethod
    def tensor_shapes(cls, site: Site) -> Shapes:
        size, (n_in, n_out) = site.config.size_for(site.path), linear_features(site.cell)
        return {"c3a_kernel": (n_out // size, n_in // size, size)}

    @classmethod
    def initial_tensors(cls, site: Site) -> Tensors:
        kind, (n_in, n_out) = site.config.init_weights, linear_features(site.cell)
        shape = cls.tensor_shapes(site)["c3a_kernel"]
        if kind is True:
            value = np.zeros(shape)
        elif kind == "gaussian":
            value = np.random.standard_normal(shape)
        else:
            bound = np.sqrt(1 / n_in if kind == "kaiming_uniform" else 6 / (n_in + n_out))
            value = np.random.uniform(-bound, bound, shape)
        return {"c3a_kernel": value.astype(np.float32)}

    @classmethod
    def holds(cls, room: Shapes, shapes: Shapes) -> bool:
        return room == shapes  # the size of the blocks

    @classmethod
    def merged(cls, site: Site, weights: Tensors, tensors: Tensors, shared: Tensors | None = None) -> Tensors:
        kernel = tensors["c3a_kernel"]
        delta = circulant(kernel) / np.float32(kernel.shape[1] * kernel.shape[2])
        return {"weight": weights["weight"] + delta}

    def construct(self, x: ms.Tensor) -> ms.Tensor:
        kernel = self.c3a_kernel * (self.scaling * (1.0 / self.shape[1]))
        delta = ops.gather(kernel.reshape((-1,)), self.places, 0).reshape(self.shape)
        return self.with_delta(x, delta)


def circulant(kernel: np.ndarray) -> np.ndarray:
    """The matrix (m b, n b) of vectors (m, n, b): row k and column j of a block hold entry (j - k) mod b."""
    rows, columns, size = kernel.shape
    steps = np.arange(size)
    blocks = kernel[:, :, (steps - steps[:, None]) % size]
    return blocks.transpose(0, 2, 1, 3).reshape(rows * size, columns * size)
