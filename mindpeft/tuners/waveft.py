"""WaveFT: a few of the delta's wavelet coefficients are trained.

Bilican et al. 2025, "Exploring Sparsity for Parameter Efficient Fine Tuning Using Wavelets": D is the inverse
discrete wavelet transform, of one level, of a matrix that is zero but for the trained numbers, whose places a
seed decides. Both axes are transformed alike, so D = R S C^T with fixed matrices R and C of shifted filters.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, ClassVar

import mindspore as ms
import numpy as np
from mindspore import nn, ops

from mindpeft.config import PeftType, register_method
from mindpeft.errors import InputError
from mindpeft.ops.delta import SparseDeltaProduct
from mindpeft.parameters import assign
from mindpeft.targets import LORA_TARGETS, pattern_value
from mindpeft.tuners.base import (
    Shapes,
    Site,
    Tensors,
    TunerLayer,
    check_linear,
    is_transposed,
    linear_features,
    original,
)
from mindpeft.tuners.delta import DeltaLayer
from mindpeft.tuners.fourierft import MOST_PLACES, places_of
from mindpeft.tuners.targeted import TargetedConfig, check_choice, check_count, check_number

# Symlets differ from Daubechies' wavelets in which roots of their polynomial are inverted: for each number of
# vanishing moments, those of the roots, by falling real part, one for each conjugate pair.
_INVERTED = {2: "0", 3: "0", 4: "01", 5: "10", 6: "101", 7: "100", 8: "0101", 9: "0110", 10: "10101"}
FAMILIES = (*(f"db{n}" for n in range(1, 11)), *(f"sym{n}" for n in _INVERTED))
_SPARSE = 4  # so many times fewer entries than the weight has
_NOT_IN_PEFT = {"rwkv", "btlm", "rwkv7"}


@register_method
@dataclass
class WaveFTConfig(TargetedConfig):
    """Hugging Face PEFT's configuration of WaveFT, key by key.

    Attributes:
        n_frequency: how many numbers are trained for each cell.
        scaling: the factor of the delta.
        wavelet_family: "db1" to "db10" or "sym2" to "sym10"; PEFT has "coif1" to "coif5" besides.
        use_idwt: transform; else the numbers are entries of the delta itself.
        random_loc_seed: decides their places, the same ones as in PEFT.
        fan_in_fan_out: the weights are (in, out); set from the cells themselves.
        target_modules: names or dotted suffixes of linear cells, or a regular expression for the full path,
            or "all-linear"; ``None`` takes the model type's default.
        exclude_modules: cells never targeted, given the same way.
        bias: which of the base model's biases are trained: "none", "all", "waveft_only".
        modules_to_save: cells trained and saved whole (a fresh head).
        layers_to_transform: only these layer indices; needs a list of targets.
        layers_pattern: the name before the layer index.
        n_frequency_pattern: regular expression for the end of a name -> its ``n_frequency``.
        proportional_parameters: share the numbers out by the cells' sizes.
        init_weights: start with zeros, so that nothing changes; else with small normal numbers.

    Raises:
        InputError: a value is not allowed, or keys contradict each other.
    """

    n_frequency: int = 2592
    scaling: float = 25.0
    wavelet_family: str = "db1"
    use_idwt: bool = True
    random_loc_seed: int = 777
    fan_in_fan_out: bool = False
    exclude_modules: set[str] | list[str] | str | None = None
    bias: str = "none"
    layers_to_transform: list[int] | int | None = None
    layers_pattern: list[str] | str | None = None
    n_frequency_pattern: dict[str, int] = field(default_factory=dict)
    proportional_parameters: bool = False
    init_weights: bool = True

    METHOD: ClassVar[PeftType] = PeftType.WAVEFT
    DEFAULT_TARGETS: ClassVar = {
        **{model: names for model, names in LORA_TARGETS.items() if model not in _NOT_IN_PEFT},
        "gpt2": ["mlp.c_proj"],
        "gpt_bigcode": ["mlp.c_proj"],
    }
    BIAS_ONLY = "waveft_only"

    def __post_init__(self) -> None:
        super().__post_init__()
        self.n_frequency_pattern = self.n_frequency_pattern or {}
        counts = {f"n_frequency_pattern[{key!r}]": n for key, n in self.n_frequency_pattern.items()}
        for key, count in {"n_frequency": self.n_frequency, **counts}.items():
            check_count(key, count)
        check_number("scaling", self.scaling)
        check_count("random_loc_seed", self.random_loc_seed, least=0)
        check_choice("wavelet_family", self.wavelet_family, FAMILIES)

    def slot_class(self, cell: nn.Cell, path: str) -> type[TunerLayer]:
        check_linear(cell, path, "WaveFT")
        places = math.prod(linear_features(cell))
        if places >= MOST_PLACES:
            raise InputError(
                f"WaveFT can't wrap {path!r}: it has {places} weights, which must be under {MOST_PLACES}"
            )
        return WaveFTLinear


@lru_cache
def low_pass(family: str) -> np.ndarray:
    """The reconstruction's low-pass filter of a family, by spectral factorisation (Daubechies 1988)."""
    kind, moments = family.rstrip("0123456789"), int(family.lstrip("dbsym"))
    polynomial = [math.comb(moments - 1 + k, k) for k in range(moments)]
    roots = []
    for y in np.roots(polynomial[::-1]):
        middle = 1 - 2 * y
        step = np.sqrt(middle * middle - 1 + 0j)
        root = min(middle + step, middle - step, key=abs)
        if root.imag > -1e-9:
            roots.append(root)
    inverted = _INVERTED[moments] if kind == "sym" else "0" * len(roots)
    result = np.poly(-np.ones(moments)).astype(complex)
    for root, flip in zip(sorted(roots, key=lambda z: -z.real), inverted, strict=True):
        chosen = 1 / root if flip == "1" else root
        pair = [chosen] if abs(root.imag) <= 1e-9 else [chosen, chosen.conjugate()]
        result = np.convolve(result, np.poly(pair))
    return result.real * (math.sqrt(2) / result.real.sum())


@lru_cache
def synthesis(family: str, width: int) -> np.ndarray:
    """The matrix (width, coefficients) of the inverse transform along one axis, low ones first."""
    low = low_pass(family)
    size = len(low)
    high = low[::-1] * (-1.0) ** np.arange(size)
    half = (width + size - 2 + 1) // 2  # the least even number of coefficients, halved
    full = np.zeros((2 * half + size - 2, 2 * half))
    for number in range(half):
        full[2 * number : 2 * number + size, number] = low
        full[2 * number : 2 * number + size, half + number] = high
    edge = (2 * size - 3) // 2
    inner = full[edge : len(full) - edge]
    start = (len(inner) - width) // 2
    return inner[start : start + width].astype(np.float32)


def coefficient_places(config: WaveFTConfig, n_out: int, n_in: int, count: int) -> np.ndarray:
    """Flat int32 places in the delta or, with a transform, in the matrix of coefficients."""
    rows, columns = np.divmod(places_of(config.random_loc_seed, n_out * n_in, count), n_in)
    if not config.use_idwt:
        return (rows * n_in + columns).astype(np.int32)
    height, width = (synthesis(config.wavelet_family, size).shape[1] for size in (n_out, n_in))
    rows, columns = rows + (height - n_out) // 2, columns + (width - n_in) // 2
    # PEFT takes the upper right for what is high along the rows' axis, the lower left for the columns'.
    low_row, low_column = rows < height // 2, columns < width // 2
    mixed = low_row != low_column
    rows = np.where(mixed, np.where(low_row, rows + height // 2, rows - height // 2), rows)
    columns = np.where(mixed, np.where(low_column, columns + width // 2, columns - width // 2), columns)
    return (rows * width + columns).astype(np.int32)


@lru_cache
def support(family: str, width: int) -> tuple[np.ndarray, np.ndarray]:
    """Where the columns of ``synthesis`` are not zero: rows and numbers, (coefficients, most in a column).

    Those of the identity for the family "". Shorter columns have zeros at row 0 behind them.
    """
    if not family:
        return np.arange(width)[:, None], np.ones((width, 1), np.float32)
    matrix = synthesis(family, width)
    columns, rows = np.nonzero(matrix.T)
    counts = np.bincount(columns, minlength=matrix.shape[1])
    ranks = np.arange(len(columns)) - np.repeat(np.cumsum(counts) - counts, counts)
    shape = matrix.shape[1], counts.max()
    found, numbers = np.zeros(shape, np.int64), np.zeros(shape, np.float32)
    found[columns, ranks], numbers[columns, ranks] = rows, matrix[rows, columns]
    return found, numbers


def entries_of(family: str, n_out: int, n_in: int, places: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Where the coefficients at some flat places come to lie in the delta, and with which factors.

    Returns:
        rows and columns, (2, n entries), and factors, (n, entries).
    """
    sides = support(family, n_out), support(family, n_in)
    chosen = np.divmod(places, len(sides[1][0]))
    (rows, down), (columns, across) = (
        [part[where] for part in side] for side, where in zip(sides, chosen, strict=True)
    )
    pairs = np.broadcast_arrays(rows[:, :, None], columns[:, None])
    factors = down[:, :, None] * across[:, None]
    return np.stack(pairs).reshape(2, -1).astype(np.int32), factors.reshape(len(places), -1)


class WaveFTLinear(DeltaLayer):
    """The trained numbers (n_frequency).

    A wavelet is short, so few entries of the delta are not zero; only for the longest is the transform made.
    """

    def __init__(self, base_layer: nn.Cell, *slot: Any) -> None:
        super().__init__(base_layer, *slot)
        self.n_in, self.n_out = linear_features(original(base_layer))
        (count,) = self.slot_shapes["waveft_spectrum"]
        places = ms.Tensor(np.arange(count), ms.int32)
        self.places = ms.Parameter(places, name=self._name("places"), requires_grad=False)
        self.family, self.rows, self.columns, self.is_sparse = "", None, None, False
        self.matmul, self.tile, self.sparse_product = ops.MatMul(), ops.Tile(), SparseDeltaProduct()

    @classmethod
    def count(cls, site: Site) -> int:
        """How many numbers a cell has."""
        config, places = site.config, math.prod(linear_features(site.cell))
        if config.proportional_parameters:
            everything = sum(math.prod(linear_features(cell)) for cell in site.targets.values())
            share = places / everything
            count = max(1, round(share * (config.n_frequency * len(site.targets))))
        else:
            count = pattern_value(config.n_frequency_pattern, site.path, config.n_frequency)
        if count > places:
            raise InputError(
                f"n_frequency={count} is more than {site.path!r} has places for, which is {places}"
            )
        return count

    @classmethod
    def tensor_shapes(cls, site: Site) -> Shapes:
        return {"waveft_spectrum": (cls.count(site),)}

    @classmethod
    def initial_tensors(cls, site: Site) -> Tensors:
        spread = 0.0 if site.config.init_weights else 0.01
        return {"waveft_spectrum": np.random.normal(0, spread, cls.count(site)).astype(np.float32)}

    @classmethod
    def scaling_of(cls, site: Site) -> float:
        return site.config.scaling

    @classmethod
    def holds(cls, room: Shapes, shapes: Shapes) -> bool:
        return room == shapes  # spare numbers would have places too

    @classmethod
    def merged(cls, site: Site, weights: Tensors, tensors: Tensors, shared: Tensors | None = None) -> Tensors:
        config, values, (n_in, n_out) = site.config, tensors["waveft_spectrum"], linear_features(site.cell)
        sides = [synthesis(config.wavelet_family, n) if config.use_idwt else np.eye(n) for n in (n_out, n_in)]
        sparse = np.zeros(sides[0].shape[1] * sides[1].shape[1], np.float32)
        sparse[coefficient_places(config, n_out, n_in, len(values))] = values
        delta = sides[0] @ sparse.reshape(-1, sides[1].shape[1]) @ sides[1].T
        delta = (delta * config.scaling).astype(np.float32)
        return {"weight": weights["weight"] + (delta.T if is_transposed(site.cell) else delta)}

    def configure(self, config: WaveFTConfig, trainable: bool) -> bool:
        count = self.slot_shapes["waveft_spectrum"][0]
        places = coefficient_places(config, self.n_out, self.n_in, count)
        assign(self.places, places)
        family = config.wavelet_family if config.use_idwt else ""
        changed, self.family = family != self.family, family
        if changed and family:
            sides = (ms.Tensor(synthesis(family, n), self.slot_dtype) for n in (self.n_out, self.n_in))
            self.rows, self.columns = sides
        return self.spread(*entries_of(family, self.n_out, self.n_in, places)) or changed

    def spread(self, entries: np.ndarray, factors: np.ndarray) -> bool:
        """Take over the delta's entries; return whether that changed the graph."""
        is_sparse = factors.size * _SPARSE <= self.n_out * self.n_in
        changed, self.is_sparse = is_sparse != self.is_sparse, is_sparse
        if not is_sparse:
            return changed
        if getattr(self, "factors", None) is None or self.factors.shape != factors.shape:
            entries, factors = ms.Tensor(entries), ms.Tensor(factors, self.slot_dtype)
            self.entries = ms.Parameter(entries, name=self._name("entries"), requires_grad=False)
            self.factors = ms.Parameter(factors, name=self._name("factors"), requires_grad=False)
            return True
        assign(self.entries, entries)
        assign(self.factors, factors)
        return changed

    def delta(self) -> ms.Tensor:
        """D (out, in); runs inside a graph."""
        values = self.waveft_spectrum * self.scaling
        if self.family == "":
            sparse = ops.zeros((self.n_out * self.n_in,), self.slot_dtype)
            return ops.tensor_scatter_elements(sparse, self.places, values).reshape((self.n_out, self.n_in))
        height, width = self.rows.shape[1], self.columns.shape[1]
        sparse = ops.tensor_scatter_elements(
            ops.zeros((height * width,), self.slot_dtype), self.places, values
        )
        return self.linear(self.matmul(self.rows, sparse.reshape((height, width))), self.columns)

    def construct(self, x: ms.Tensor) -> ms.Tensor:
        base = self.base_layer
        if not self.is_sparse or not self.is_summed(x):
            return self.with_delta(x, self.delta())
        count, each = self.factors.shape
        values = (
            self.tile((self.waveft_spectrum * self.scaling).reshape((count, 1)), (1, each)) * self.factors
        )
        return self.sparse_product(x, base.weight, values.reshape((-1,)), self.entries, base.bias)
