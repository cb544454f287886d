"""OFT: the input (of an embedding, the output) is turned by a trained rotation, block by block of columns.

Qiu et al. 2023, "Controlling Text-to-Image Diffusion by Orthogonal Finetuning", acting on the input as in
"Orthogonal Finetuning Made Scalable" (Qiu et al. 2025). A rotation R comes from a skew-symmetric matrix Q:
R = (I - Q) (I + Q)^-1 (Cayley), or the first terms of the series of (I + Q) (I - Q)^-1 (Cayley-Neumann).
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import mindspore as ms
import numpy as np
from mindspore import nn, ops

from mindpeft.config import PeftType, register_method
from mindpeft.errors import InputError
from mindpeft.tuners.base import (
    Shapes,
    Site,
    Tensors,
    TunerLayer,
    check_linear,
    is_embedding,
    linear_features,
    weight_attribute,
)
from mindpeft.tuners.orthogonal import (
    BlockRotation,
    TurnedBlocks,
    block_diagonal,
    cayley,
    cayley_of,
    identities,
    skew_layout,
)
from mindpeft.tuners.targeted import TargetedConfig, check_count, check_number, check_rate

logger = logging.getLogger(__name__)


@register_method
@dataclass
class OFTConfig(TargetedConfig):
    """Hugging Face PEFT's configuration of OFT, key by key.

    Attributes:
        r: the number of blocks; or 0.
        oft_block_size: the columns of a block; or 0. Both are adjusted to a divisor of the width.
        module_dropout: the share of blocks that are not turned, at each step of training.
        target_modules: names or dotted suffixes of cells, or a regular expression for the full path, or
            "all-linear"; ``None`` takes the model type's default.
        fan_in_fan_out: kept for the format; (in, out) weights are not supported.
        bias: which of the base model's biases are trained: "none", "all", "oft_only".
        exclude_modules: cells never targeted, given as ``target_modules``.
        init_weights: start with no rotation; else with a random one.
        layers_to_transform: only these layer indices; needs a list of targets.
        layers_pattern: the name before the layer index.
        modules_to_save: cells trained and saved whole (a fresh head).
        coft: must be false: constrained OFT is not supported.
        eps: the constraint's strength.
        block_share: all blocks are turned alike.
        use_cayley_neumann: the series instead of the inverse.
        num_cayley_neumann_terms: how many terms of it, 2 or more.

    Raises:
        InputError: a value is not allowed, or keys contradict each other.
    """

    r: int = 0
    oft_block_size: int = 32
    module_dropout: float = 0.0
    fan_in_fan_out: bool = False
    bias: str = "none"
    exclude_modules: set[str] | list[str] | str | None = None
    init_weights: bool = True
    layers_to_transform: list[int] | int | None = None
    layers_pattern: list[str] | str | None = None
    coft: bool = False
    eps: float = 6e-5
    block_share: bool = False
    use_cayley_neumann: bool = True
    num_cayley_neumann_terms: int = 5

    METHOD: ClassVar[PeftType] = PeftType.OFT
    BIAS_ONLY = "oft_only"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count("r", self.r, least=0)
        check_count("oft_block_size", self.oft_block_size, least=0)
        if (self.r == 0) == (self.oft_block_size == 0):
            raise InputError(
                f"exactly one of r and oft_block_size must be 0, not {self.r!r} and {self.oft_block_size!r} "
                "(files without oft_block_size, from before PEFT 0.14, can't be read)"
            )
        check_rate("module_dropout", self.module_dropout)
        check_number("eps", self.eps)
        check_count("num_cayley_neumann_terms", self.num_cayley_neumann_terms, least=2)
        if self.coft:
            raise InputError("coft=True is not supported; only unconstrained OFT is (leave it at False)")

    def as_written(self, values: Mapping[str, Any]) -> OFTConfig:
        version = tuple(map(int, re.findall(r"\d+", str(values.get("peft_version", "")))[:2]))
        terms = series_terms(self)
        if version < (0, 18) and terms > 2:
            logger.warning(
                "the adapter is from PEFT before 0.18, where use_cayley_neumann with %d terms ended in "
                "2 Q^%d; as in PEFT since, it ends in Q^%d here: answers differ from those then",
                terms,
                terms - 1,
                last_power(terms),
            )
        return self

    def slot_class(self, cell: nn.Cell, path: str) -> type[TunerLayer]:
        if is_embedding(cell):
            return OFTEmbedding
        check_linear(cell, path, "OFT", transposed=False)
        return OFTLinear

    def split(self, width: int, path: str) -> tuple[int, int]:
        """(blocks, size) for a width, adjusted like PEFT's to the nearest divisor of it.

        Raises:
            InputError: blocks of one column: there is nothing to turn.
        """
        wanted = self.r or self.oft_block_size
        chosen = min((n for n in range(1, width + 1) if width % n == 0), key=lambda n: (abs(n - wanted), n))
        if chosen != wanted:
            key = "r" if self.r else "oft_block_size"
            logger.warning("%s is %d for %s, whose width of %d it must divide", key, chosen, path, width)
        blocks, size = (chosen, width // chosen) if self.r else (width // chosen, chosen)
        if size == 1:
            raise InputError(f"OFT has nothing to turn in {path!r}: blocks of one column of its {width}")
        return blocks, size


class OFTLayer(TurnedBlocks):
    """What both kinds share: the numbers of Q's upper triangle, (blocks, size (size - 1) / 2)."""

    NAME: ClassVar[str]
    RATE = "module_dropout"

    def __init__(self, base_layer: nn.Cell, *slot: Any) -> None:
        super().__init__(base_layer, *slot)
        self.terms = 0  # of the series; 0 for the inverse

    @classmethod
    def width(cls, site: Site) -> int:
        """How many columns are turned."""
        raise NotImplementedError

    @classmethod
    def tensor_shapes(cls, site: Site) -> Shapes:
        blocks, size = site.config.split(cls.width(site), site.path)
        return {cls.NAME: (1 if site.config.block_share else blocks, size * (size - 1) // 2)}

    @classmethod
    def initial_tensors(cls, site: Site) -> Tensors:
        (shape,) = cls.tensor_shapes(site).values()
        value = np.zeros(shape) if site.config.init_weights else np.random.normal(0, 0.1, shape)
        return {cls.NAME: value.astype(np.float32)}

    @classmethod
    def rotation(cls, site: Site, tensors: Tensors) -> np.ndarray:
        value = tensors[cls.NAME]
        _, index, sign = skew_layout(value.shape[1])
        skew = value[:, index] * sign
        terms = series_terms(site.config)
        matrices = series(skew, np.eye(skew.shape[-1]), terms, np.matmul) if terms else cayley_of(skew)
        return block_diagonal(matrices, cls.width(site))

    def configure(self, config: OFTConfig, trainable: bool) -> bool:
        changed = super().configure(config, trainable) or self.terms != series_terms(config)
        self.terms = series_terms(config)
        return changed

    def reserve(self, shapes: Shapes) -> bool:
        changed = super().reserve(shapes)
        blocks, count = self.slot_shapes[self.NAME]
        self.size, index, sign = skew_layout(count)
        self.index, self.sign = (
            ms.Tensor(index.reshape(-1)),
            ms.Tensor(np.tile(sign, (blocks, 1, 1)), self.slot_dtype),
        )
        self.rotate = BlockRotation(blocks, self.size, self.slot_dtype)
        self.product = ops.BatchMatMul()
        return changed

    def skewed(self, value: ms.Tensor) -> ms.Tensor:
        """Q (blocks, size, size) from the numbers of its upper triangle."""
        return ops.gather(value, self.index, 1).reshape((-1, self.size, self.size)) * self.sign

    def matrices_of(self, value: ms.Tensor) -> ms.Tensor:
        """R (blocks, size, size) from the numbers of Q's upper triangle."""
        skew = self.skewed(value)
        if self.terms == 0:
            return cayley(skew)
        return series(skew, identities(skew), self.terms, self.product)


class OFTLinear(OFTLayer):
    """OFT on the input of a linear cell."""

    NAME = "oft_R.weight"

    @classmethod
    def width(cls, site: Site) -> int:
        return linear_features(site.cell)[0]

    def blocks(self) -> ms.Tensor:
        return self.matrices_of(self.oft_R.weight)


class OFTEmbedding(OFTLayer):
    """OFT on the rows that an embedding gives."""

    NAME = "oft_embedding_R.weight"

    @classmethod
    def width(cls, site: Site) -> int:
        return getattr(site.cell, weight_attribute(site.cell)).shape[1]

    @classmethod
    def merged(cls, site: Site, weights: Tensors, tensors: Tensors, shared: Tensors | None = None) -> Tensors:
        attribute = weight_attribute(site.cell)
        return {attribute: weights[attribute] @ cls.rotation(site, tensors)}

    def blocks(self) -> ms.Tensor:
        return self.matrices_of(self.oft_embedding_R.weight)

    def construct(self, ids: ms.Tensor) -> ms.Tensor:
        return self.turned_input(self.base_layer(ids))


def series_terms(config: OFTConfig) -> int:
    """How many terms of the series a config takes; 0 for none of it."""
    return config.num_cayley_neumann_terms if config.use_cayley_neumann else 0


def last_power(terms: int) -> int:
    """The last power of Q in a series of more than two terms."""
    return max(terms - 1, 3)


def series(skew: Any, one: Any, terms: int, product: Callable) -> Any:
    """I + 2 Q + 2 Q^2 + ... + Q^(terms - 1); as in PEFT, two terms are I + 2 Q and three are as four.

    Args:
        skew: Q (blocks, size, size), a tensor in a graph or an array.
        one: the identity, to be added to it.
        terms: 2 or more.
        product: the matrix product.
    """
    result = one + skew * 2.0
    if terms == 2:
        return result
    last = last_power(terms)
    power = skew
    for exponent in range(2, last + 1):
        power = product(power, skew)
        result = result + power * (1.0 if exponent == last else 2.0)
    return result
