"""FourierFT: a few entries of the delta's two-dimensional spectrum are trained.

Gao et al. 2024, "Parameter-Efficient Fine-Tuning with Discrete Fourier Transform": D = Re(ifft2(S)), where S
is zero but for the trained numbers, whose places a seed decides.
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
from mindpeft.parameters import assign
from mindpeft.targets import LORA_TARGETS
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
from mindpeft.tuners.targeted import TargetedConfig, check_count, check_number

MOST_PLACES = (2**32 - 1) // 20  # from there on torch draws larger numbers


@register_method
@dataclass
class FourierFTConfig(TargetedConfig):
    """Hugging Face PEFT's configuration of FourierFT, key by key.

    Attributes:
        n_frequency: how many numbers are trained for each cell.
        scaling: the factor of the delta.
        random_loc_seed: decides their places in the spectrum, the same ones as in PEFT.
        fan_in_fan_out: the weights are (in, out); set from the cells themselves.
        target_modules: names or dotted suffixes of linear cells, or a regular expression for the full path,
            or "all-linear"; ``None`` takes the model type's default.
        exclude_modules: cells never targeted, given the same way.
        bias: which of the base model's biases are trained: "none", "all", "fourier_only".
        modules_to_save: cells trained and saved whole (a fresh head).
        layers_to_transform: only these layer indices; needs a list of targets.
        layers_pattern: the name before the layer index.
        n_frequency_pattern: regular expression for what follows a dot to the end of a name, or a full name
            -> its ``n_frequency``.
        init_weights: start with zeros, so that nothing changes; else with normal numbers.

    Raises:
        InputError: a value is not allowed, or keys contradict each other.
    """

    n_frequency: int = 1000
    scaling: float = 150.0
    random_loc_seed: int = 777
    fan_in_fan_out: bool = False
    exclude_modules: set[str] | list[str] | str | None = None
    bias: str = "none"
    layers_to_transform: list[int] | int | None = None
    layers_pattern: list[str] | str | None = None
    n_frequency_pattern: dict[str, int] = field(default_factory=dict)
    init_weights: bool = False

    METHOD: ClassVar[PeftType] = PeftType.FOURIERFT
    DEFAULT_TARGETS: ClassVar = {**LORA_TARGETS, "gpt2": ["mlp.c_proj"], "gpt_bigcode": ["mlp.c_proj"]}
    BIAS_ONLY = "fourier_only"

    def __post_init__(self) -> None:
        super().__post_init__()
        self.n_frequency_pattern = self.n_frequency_pattern or {}
        counts = {f"n_frequency_pattern[{key!r}]": n for key, n in self.n_frequency_pattern.items()}
        for key, count in {"n_frequency": self.n_frequency, **counts}.items():
            check_count(key, count)
        check_number("scaling", self.scaling)
        check_count("random_loc_seed", self.random_loc_seed, least=0)

    def slot_class(self, cell: nn.Cell, path: str) -> type[TunerLayer]:
        check_linear(cell, path, "FourierFT")
        count, places = self.count(path), int(np.prod(linear_features(cell)))
        if count > places:
            raise InputError(f"n_frequency={count} is more than {path!r} has places for, which is {places}")
        if places >= MOST_PLACES:
            raise InputError(
                f"FourierFT can't wrap {path!r}: it has {places} weights, which must be under {MOST_PLACES}"
            )
        return FourierFTLinear

    def count(self, path: str) -> int:
        """``n_frequency`` of a cell; like PEFT, a pattern must match from a dot on, or be the full name."""
        patterns = self.n_frequency_pattern
        key = next((key for key in patterns if re.match(rf".*\.{key}$", path)), path)
        return patterns.get(key, self.n_frequency)


def places_of(seed: int, size: int, count: int) -> np.ndarray:
    """The first ``count`` entries of torch's ``randperm(size)`` for a seed of its CPU generator.

    A Fisher-Yates shuffle driven by the Mersenne Twister, of which only the first steps are needed.
    """
    draws = np.random.RandomState(seed % 2**32).randint(0, 2**32, count, dtype=np.uint32).tolist()
    moved: dict[int, int] = {}
    result = []
    for step, draw in enumerate(draws):
        other = step + draw % (size - step)
        result.append(moved.get(other, other))
        moved[other] = moved.get(step, step)
    return np.array(result, np.int32)


class SparseToWeight(nn.Cell):
    """Re(ifft2(S)) (rows, columns) for S with some numbers at flat places and zeros elsewhere."""

    def __init__(self, rows: int, columns: int) -> None:
        super().__init__()
        self.shape = (rows, columns)

    def construct(self, values: ms.Tensor, places: ms.Tensor) -> ms.Tensor:
        spectrum = ops.zeros((self.shape[0] * self.shape[1],), ms.float32)
        spectrum = ops.tensor_scatter_elements(spectrum, places, ops.cast(values, ms.float32))
        return ops.cast(ops.real(ops.ifft2(spectrum.reshape(self.shape))), values.dtype)

    def bprop(self, values, places, out, dout):
        # The real part of the transform is a symmetric matrix: what goes back goes through it once more.
        back = ops.real(ops.ifft2(ops.cast(dout, ms.float32))).reshape((-1,))
        return ops.cast(ops.gather(back, places, 0), values.dtype), ops.zeros_like(places)


class FourierFTLinear(DeltaLayer):
    """The trained numbers (n_frequency)."""

    def __init__(self, base_layer: nn.Cell, *slot: Any) -> None:
        super().__init__(base_layer, *slot)
        n_in, n_out = linear_features(original(base_layer))
        self.size = n_in * n_out
        self.to_weight = SparseToWeight(n_out, n_in)
        (count,) = self.slot_shapes["fourierft_spectrum"]
        places = ms.Tensor(np.arange(count), ms.int32)
        self.places = ms.Parameter(places, name=self._name("places"), requires_grad=False)

    @classmethod
    def tensor_shapes(cls, site: Site) -> Shapes:
        return {"fourierft_spectrum": (site.config.count(site.path),)}

    @classmethod
    def initial_tensors(cls, site: Site) -> Tensors:
        (shape,) = cls.tensor_shapes(site).values()
        value = np.zeros(shape) if site.config.init_weights else np.random.standard_normal(shape)
        return {"fourierft_spectrum": value.astype(np.float32)}

    @classmethod
    def scaling_of(cls, site: Site) -> float:
        return site.config.scaling

    @classmethod
    def holds(cls, room: Shapes, shapes: Shapes) -> bool:
        return room == shapes  # spare numbers would have places too

    @classmethod
    def merged(cls, site: Site, weights: Tensors, tensors: Tensors, shared: Tensors | None = None) -> Tensors:
        n_in, n_out = linear_features(site.cell)
        values = tensors["fourierft_spectrum"]
        spectrum = np.zeros(n_in * n_out, np.float32)
        spectrum[places_of(site.config.random_loc_seed, spectrum.size, len(values))] = values
        delta = np.fft.ifft2(spectrum.reshape(n_out, n_in)).real.astype(np.float32)
        delta *= np.float32(site.config.scaling)
        return {"weight": weights["weight"] + (delta.T if is_transposed(site.cell) else delta)}

    def configure(self, config: FourierFTConfig, trainable: bool) -> bool:
        count = self.slot_shapes["fourierft_spectrum"][0]
        assign(self.places, places_of(config.random_loc_seed, self.size, count))
        return False

    def construct(self, x: ms.Tensor) -> ms.Tensor:
        return self.with_delta(x, self.to_weight(self.fourierft_spectrum * self.scaling, self.places))
