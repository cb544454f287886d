"""SHiRA: a few of a weight's entries, at places drawn once, get a trained number added.

Bhardwaj et al. 2024, "Sparse High Rank Adapters": y = (W + S) x + b, where S holds r (in + out) numbers. The
places are in the file beside the numbers.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import mindspore as ms
import numpy as np
from mindspore import nn

from mindpeft.config import PeftType, register_method
from mindpeft.errors import InputError
from mindpeft.ops.delta import SparseDeltaProduct, dense
from mindpeft.targets import LORA_TARGETS
from mindpeft.tuners.base import Shapes, Site, Tensors, TunerLayer, check_linear, linear_features, original
from mindpeft.tuners.delta import DeltaLayer
from mindpeft.tuners.fourierft import MOST_PLACES, places_of
from mindpeft.tuners.targeted import TargetedConfig, check_count

VALUES, PLACES = "shira_weight", "shira_indices"


@register_method
@dataclass
class ShiraConfig(TargetedConfig):
    """Hugging Face PEFT's configuration of SHiRA, key by key.

    Attributes:
        r: as many numbers are trained as LoRA of this rank has.
        mask_type: how the places are chosen: "random".
        random_seed: decides the places of a fresh adapter, the same ones as in PEFT; ``None`` draws them.
            They are in the file either way.
        target_modules: names or dotted suffixes of linear cells, or a regular expression for the full path,
            or "all-linear"; ``None`` takes the model type's default.
        fan_in_fan_out: must be false: cells with (in, out) weights are refused, as PEFT does.
        init_weights: start with zeros, so that nothing changes; else with normal numbers.
        modules_to_save: cells trained and saved whole (a fresh head).

    Raises:
        InputError: a value is not allowed, or keys contradict each other.
    """

    r: int = 32
    mask_type: str = "random"
    random_seed: int | None = None
    fan_in_fan_out: bool = False
    init_weights: bool = True

    METHOD: ClassVar[PeftType] = PeftType.SHIRA
    WHOLE_NUMBERS: ClassVar[tuple[str, ...]] = (*TargetedConfig.WHOLE_NUMBERS, PLACES)
    DEFAULT_TARGETS: ClassVar = {**LORA_TARGETS, "phi": ["q_proj", "v_proj"]}

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count("r", self.r)
        if self.random_seed is not None:
            check_count("random_seed", self.random_seed, least=0)
        if self.mask_type != "random" and not self.inference_mode:
            raise InputError(
                f'mask_type must be "random", not {self.mask_type!r}; others are read from files alone'
            )

    def slot_class(self, cell: nn.Cell, path: str) -> type[TunerLayer]:
        check_linear(cell, path, "SHiRA", transposed=False)
        n_in, n_out = linear_features(cell)
        if self.r * (n_in + n_out) > n_in * n_out:
            most = n_in * n_out // (n_in + n_out)
            raise InputError(f"r={self.r} is more than {path!r} has places for; it may be up to {most}")
        if self.random_seed is not None and n_in * n_out >= MOST_PLACES:
            raise InputError(
                f"random_seed is not possible for {path!r}: it has {n_in * n_out} weights, which must be "
                f"under {MOST_PLACES}"
            )
        return ShiraLinear


class ShiraLinear(DeltaLayer):
    """The trained numbers (n), and their rows and columns (2, n)."""

    BUFFERS = frozenset({PLACES})

    def __init__(self, base_layer: nn.Cell, *slot: Any) -> None:
        super().__init__(base_layer, *slot)
        n_in, n_out = linear_features(original(base_layer))
        self.shape = (n_out, n_in)
        self.delta_product = SparseDeltaProduct()

    def _create(self, name: str, value: np.ndarray, trainable: bool) -> None:
        super()._create(name, value, trainable)
        if name == PLACES:  # half precision could not hold them
            places = ms.Tensor(value, ms.int32)
            self.shira_indices = ms.Parameter(places, name=self._name(name), requires_grad=False)

    @classmethod
    def tensor_shapes(cls, site: Site) -> Shapes:
        count = site.config.r * sum(linear_features(site.cell))
        return {VALUES: (count,), PLACES: (2, count)}

    @classmethod
    def initial_tensors(cls, site: Site) -> Tensors:
        n_in, n_out = linear_features(site.cell)
        (count,) = cls.tensor_shapes(site)[VALUES]
        seed = site.config.random_seed
        if seed is None:
            flat = np.random.choice(n_in * n_out, count, replace=False)
        else:
            flat = places_of(seed, n_in * n_out, count)
        values = np.zeros(count) if site.config.init_weights else np.random.standard_normal(count)
        places = np.stack(np.divmod(np.sort(flat), n_in))
        return {VALUES: values.astype(np.float32), PLACES: places.astype(np.float32)}

    @classmethod
    def check_values(cls, site: Site, tensors: Tensors) -> None:
        n_in, n_out = linear_features(site.cell)
        rows, columns = tensors[PLACES]
        whole = np.array_equal(tensors[PLACES], np.trunc(tensors[PLACES]))
        inside = ((rows >= 0) & (rows < n_out) & (columns >= 0) & (columns < n_in)).all()
        if not whole or not inside or len(np.unique(rows * n_in + columns)) < len(rows):
            raise InputError(
                f"{PLACES} of {site.path!r} must be rows and columns of its weight, which is "
                f"({n_out}, {n_in}), each place once"
            )

    @classmethod
    def to_file(cls, site: Site, tensors: Tensors) -> Tensors:
        return {**tensors, PLACES: tensors[PLACES].astype(np.int32)}

    @classmethod
    def holds(cls, room: Shapes, shapes: Shapes) -> bool:
        return room == shapes  # spare numbers would have places too

    @classmethod
    def merged(cls, site: Site, weights: Tensors, tensors: Tensors, shared: Tensors | None = None) -> Tensors:
        weight = weights["weight"].copy()
        weight[tuple(tensors[PLACES].astype(np.int64))] += tensors[VALUES]
        return {"weight": weight}

    def construct(self, x: ms.Tensor) -> ms.Tensor:
        values, places, base = self.shira_weight * self.scaling, self.shira_indices, self.base_layer
        if self.is_summed(x):
            return self.delta_product(x, base.weight, values, places, base.bias)
        return self.with_delta(x, dense(values, places, self.shape))
