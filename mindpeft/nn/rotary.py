"""The angles of rotary position embedding, with the scalings that stretch a model's context.

The names of the scalings and of their settings are those of Hugging Face configs (``rope_scaling``, in newer
files ``rope_parameters``).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import mindspore as ms
import mindspore.nn as nn
import numpy as np
from mindspore import Tensor, ops

from mindpeft.errors import InputError, did_you_mean
from mindpeft.ops.cpu import kernels_on
from mindpeft.ops.device import on_cpu


@dataclass(frozen=True)
class RotarySpec:
    """What the angles are made of.

    Attributes:
        size: the columns of a head that are turned.
        theta: the base of the geometric series of frequencies.
        max_positions: the longest text that the model is made for.
        kind: "default", or the name of a scaling.
        settings: the scaling's own.
        interleaved: neighbouring columns are a pair; else one of the first half and one of the second.
    """

    size: int
    theta: float
    max_positions: int
    kind: str = "default"
    settings: Mapping[str, Any] = field(default_factory=dict)
    interleaved: bool = False

    def __post_init__(self) -> None:
        if self.size < 2 or self.size % 2:
            raise InputError(f"rotary embedding turns pairs of columns, but a head has {self.size} to turn")
        if self.kind not in SCALINGS:
            raise InputError(
                f"rope_type {self.kind!r} is not supported; known: {', '.join(SCALINGS)}"
                + did_you_mean(str(self.kind), SCALINGS)
            )

    def number(self, key: str, default: float | None = None) -> float:
        """A setting that is a number.

        Raises:
            InputError: it is missing and has no default, or is no positive number.
        """
        value = self.settings.get(key)
        value = default if value is None else value
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
            raise InputError(f"rope_scaling of type {self.kind!r} needs a positive {key}, not {value!r}")
        return value

    def factors(self, key: str) -> np.ndarray:
        """A setting that is a list with one number for each pair of columns."""
        value = self.settings.get(key)
        if not isinstance(value, list) or len(value) != self.size // 2:
            raise InputError(
                f"rope_scaling of type {self.kind!r} needs {key} with {self.size // 2} numbers, one for each "
                f"pair of columns, not {value!r}"
            )
        return np.array(value, np.float32)


def plain_frequencies(spec: RotarySpec) -> np.ndarray:
    """``theta ** (-2 i / size)`` for each pair i, in float32 as in the reference implementations."""
    exponents = np.arange(0, spec.size, 2, dtype=np.float32) / np.float32(spec.size)
    return (np.float32(1) / np.power(np.float32(spec.theta), exponents)).astype(np.float32)


def _default(spec: RotarySpec) -> tuple[np.ndarray, float]:
    return plain_frequencies(spec), 1.0


def _linear(spec: RotarySpec) -> tuple[np.ndarray, float]:
    return plain_frequencies(spec) / np.float32(spec.number("factor")), 1.0


def _llama3(spec: RotarySpec) -> tuple[np.ndarray, float]:
    """Long waves are stretched, short ones kept, those between blended (Llama 3.1)."""
    factor, context = spec.number("factor"), _trained_length(spec)
    low, high = spec.number("low_freq_factor"), spec.number("high_freq_factor")
    plain = plain_frequencies(spec)
    waves = 2 * math.pi / plain
    blend = (context / waves - low) / (high - low)
    blended = (1 - blend) * plain / factor + blend * plain
    found = np.where(waves > context / low, plain / factor, np.where(waves < context / high, plain, blended))
    return found.astype(np.float32), 1.0


def _yarn(spec: RotarySpec) -> tuple[np.ndarray, float]:
    """Interpolated below, extrapolated above, with a ramp between (Peng et al. 2023)."""
    context = _trained_length(spec)
    factor = spec.number("factor", spec.max_positions / context)
    pairs, plain = spec.size // 2, plain_frequencies(spec)

    def pair_with(turns: float) -> float:
        return spec.size * math.log(context / (turns * 2 * math.pi)) / (2 * math.log(spec.theta))

    low, high = pair_with(spec.number("beta_fast", 32)), pair_with(spec.number("beta_slow", 1))
    if spec.settings.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, spec.size - 1)
    ramp = (np.arange(pairs, dtype=np.float32) - low) / (high - low if high != low else 0.001)
    kept = 1 - np.clip(ramp, 0, 1)
    return (plain / factor * (1 - kept) + plain * kept).astype(np.float32), _yarn_weight(spec, factor)


def _yarn_weight(spec: RotarySpec, factor: float) -> float:
    def weight(scale: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * scale * math.log(factor) + 1.0

    if spec.settings.get("attention_factor") is not None:
        return spec.number("attention_factor")
    if spec.settings.get("mscale") and spec.settings.get("mscale_all_dim"):
        return weight(spec.number("mscale")) / weight(spec.number("mscale_all_dim"))
    return weight(1.0)


def _longrope(spec: RotarySpec) -> tuple[np.ndarray, float]:
    """A factor for each frequency (Ding et al. 2024); here those of short texts, see `RotaryTables`."""
    context = _trained_length(spec)
    factor = spec.number("factor", spec.max_positions / context)
    weight = 1.0 if factor <= 1 else math.sqrt(1 + math.log(factor) / math.log(context))
    frequencies = plain_frequencies(spec) / spec.factors("short_factor")
    return frequencies.astype(np.float32), spec.number("attention_factor", weight)


def _trained_length(spec: RotarySpec) -> float:
    return spec.number("original_max_position_embeddings", spec.max_positions)


# Name -> spec -> (frequencies of the pairs, the factor of cosines and sines)
SCALINGS: dict[str, Callable[[RotarySpec], tuple[np.ndarray, float]]] = {
    "default": _default,
    "linear": _linear,
    "dynamic": _default,
    "llama3": _llama3,
    "yarn": _yarn,
    "longrope": _longrope,
}


class RotaryTables(nn.Cell):
    """Positions to the cosines and sines that `mindpeft.ops.rotary.Rotate` takes, once for all layers."""

    def __init__(self, spec: RotarySpec, heads: int, key_heads: int):
        super().__init__()
        frequencies, self.weight = SCALINGS[spec.kind](spec)
        self.frequencies = Tensor(frequencies.reshape((1, 1, -1)))
        self.kind, self.interleaved = spec.kind, spec.interleaved
        self.heads = (heads, key_heads) if on_cpu() and not kernels_on() else (1, 1)
        self.max_positions = spec.max_positions
        if spec.kind == "dynamic":
            self.factor = spec.number("factor")
            self.exponent = spec.size / (spec.size - 2)
            steps = np.arange(0, spec.size, 2, dtype=np.float32).reshape((1, 1, -1)) / spec.size
            self.log_growth = Tensor(-steps)
        if spec.kind == "longrope":
            self.short_length = int(_trained_length(spec))
            long = plain_frequencies(spec) / spec.factors("long_factor")
            self.long_frequencies = Tensor(long.astype(np.float32).reshape((1, 1, -1)))
        self.tile = ops.Tile()
        self.concat = ops.Concat(-1)
        self.stack = ops.Stack(-1)

    def construct(self, position_ids: Tensor, dtype: ms.Type) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """
        Args:
            position_ids: (batch, length) integers.
            dtype: of the result.

        Returns:
            Cosines and sines for queries, then for keys: (batch, heads, length, size), the first sine of each
            pair negative. Heads are repeated for MindSpore's own operators of the CPU, where a broadcast
            keeps its buffers.
        """
        batch, length = position_ids.shape
        positions = position_ids.astype(ms.float32).reshape((batch, length, 1))
        angles = positions * self.scaled(position_ids)
        cos, sin = ops.cos(angles) * self.weight, ops.sin(angles) * self.weight
        if self.interleaved:
            shape = (batch, 1, length, 2 * cos.shape[-1])
            cos, sin = self.stack((cos, cos)).reshape(shape), self.stack((-sin, sin)).reshape(shape)
        else:
            shape = (batch, 1, length, 2 * cos.shape[-1])
            cos, sin = self.concat((cos, cos)).reshape(shape), self.concat((-sin, sin)).reshape(shape)
        cos, sin = cos.astype(dtype), sin.astype(dtype)
        return (*self.for_heads(cos, sin, self.heads[0]), *self.for_heads(cos, sin, self.heads[1]))

    def for_heads(self, cos: Tensor, sin: Tensor, heads: int) -> tuple[Tensor, Tensor]:
        """Both for a number of heads."""
        return self.tile(cos, (1, heads, 1, 1)), self.tile(sin, (1, heads, 1, 1))

    def scaled(self, position_ids: Tensor) -> Tensor:
        """The frequencies, which two of the scalings choose by the length of the text."""
        if self.kind == "dynamic":  # the base grows with the text (NTK)
            length = ops.maximum(position_ids.max() + 1, self.max_positions).astype(ms.float32)
            growth = (self.factor * length / self.max_positions - (self.factor - 1)) ** self.exponent
            return self.frequencies * ops.exp(self.log_growth * ops.log(growth))
        if self.kind == "longrope":
            long = (position_ids.max() + 1 > self.short_length).astype(ms.float32)
            return self.frequencies * (1 - long) + self.long_frequencies * long
        return self.frequencies
