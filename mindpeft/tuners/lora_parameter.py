"""LoRA on plain parameters: W + s B A where a cell has its matrix, or one for each expert, in a parameter.

What Hugging Face PEFT does for ``target_parameters``. The whole of W + s B A is made in every forward pass,
with one B A for each expert; see ``parameter_layout`` for the tensors.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Collection, Mapping
from functools import cache
from typing import TYPE_CHECKING, Any, ClassVar

import mindspore as ms
import numpy as np
from mindspore import nn, ops

from mindpeft.errors import InputError, did_you_mean
from mindpeft.parameters import assign
from mindpeft.targets import pattern_value, saved_modules
from mindpeft.tuners.adapted_value import adapt, restore
from mindpeft.tuners.base import Shapes, Site, Tensors, kaiming_uniform, original
from mindpeft.tuners.lora_layers import LoraLayer
from mindpeft.tuners.parameter_layout import Layout, layouts_of
from mindpeft.tuners.targeted import name_set

if TYPE_CHECKING:
    from mindpeft.tuners.base import Slot
    from mindpeft.tuners.plan import BaseModel

_INITIALISATIONS = (True, False, "gaussian")

logger = logging.getLogger(__name__)


class ParameterDelta(nn.Cell):
    """Adds s B A of one slot to a parameter's value.

    Args:
        pair: holds ``lora_A.weight`` and ``lora_B.weight``, as they lie in the slot, and ``factor``, the s.
    """

    def __init__(self, pair: nn.Cell, layout: Layout, dtype: ms.dtype) -> None:
        super().__init__(auto_prefix=False)
        self.pair, self.transposed, self.dtype = pair, layout.transposed, dtype
        turned = {"transpose_a": layout.transposed, "transpose_b": layout.transposed}
        self.matmul = ops.BatchMatMul(**turned) if len(layout.shape) == 3 else ops.MatMul(**turned)

    def construct(self, weight: ms.Tensor) -> ms.Tensor:
        first, second = self.pair.lora_A.weight, self.pair.lora_B.weight
        product = self.matmul(first, second) if self.transposed else self.matmul(second, first)
        return ops.cast(ops.cast(weight, self.dtype) + product * self.pair.factor, weight.dtype)


class LoraParameters(LoraLayer):
    """LoRA on parameters of a cell; a subclass says which."""

    PARAMETERS: ClassVar[tuple[tuple[str, str], ...]]

    def __init__(self, base_layer: nn.Cell, path: str, shapes: Shapes, dtype: ms.dtype, *slot: Any) -> None:
        self.cell_layouts = layouts_of(original(base_layer), self.PARAMETERS)
        self.layout_of = {name: layout for layout in self.cell_layouts for name in layout.names}
        self.scalings = [1.0] * len(self.cell_layouts)
        super().__init__(base_layer, path, shapes, dtype, *slot)
        for layout in self.cell_layouts:
            pair = self.pair_of(layout)
            name = self._name(f"{layout.prefix}scaling_{layout.attribute}")
            pair.factor = ms.Parameter(ms.Tensor(0.0, dtype), name=name, requires_grad=False)
            adapt(original(base_layer), layout.attribute, ParameterDelta(pair, layout, dtype))

    @classmethod
    def ranks(cls, site: Site) -> list[tuple[Layout, int]]:
        """Each parameter's layout and rank: its pattern's, or ``r``."""
        return [
            (layout, pattern_value(site.config.rank_pattern, f"{site.path}.{layout.key}", site.config.r))
            for layout in layouts_of(site.cell, cls.PARAMETERS)
        ]

    @classmethod
    def tensor_shapes(cls, site: Site) -> Shapes:
        return {
            name: shape for layout, rank in cls.ranks(site) for name, shape in layout.shapes(rank).items()
        }

    @classmethod
    def initial_tensors(cls, site: Site) -> Tensors:
        kind, values = site.config.init_lora_weights, {}
        if kind not in _INITIALISATIONS:
            raise InputError(
                f"init_lora_weights={kind!r} is not possible with target_parameters; "
                'allowed: true, false, "gaussian"'
            )
        for layout, rank in cls.ranks(site):
            for name, shape in layout.shapes(rank).items():
                if name == layout.names[1] and kind:
                    values[name] = np.zeros(shape)
                else:
                    values[name] = (
                        np.random.normal(0, 1 / rank, shape) if kind == "gaussian" else kaiming_uniform(shape)
                    )
        return {name: value.astype(np.float32) for name, value in values.items()}

    @classmethod
    def scaling_of(cls, site: Site) -> float:
        return 1.0  # each parameter has its own

    @classmethod
    def takes_out(cls, site: Site) -> bool:
        return False

    @classmethod
    def merged(cls, site: Site, weights: Tensors, tensors: Tensors, shared: Tensors | None = None) -> Tensors:
        found = {}
        for layout, rank in cls.ranks(site):
            scaling = np.float32(site.config.scaling_at(f"{site.path}.{layout.key}", rank))
            found[layout.attribute] = weights[layout.attribute] + layout.product(tensors) * scaling
        return found

    def configure(self, config: Any, trainable: bool) -> bool:
        keys = [f"{self.path}.{layout.key}" for layout in self.cell_layouts]
        self.scalings = [
            config.scaling_at(key, pattern_value(config.rank_pattern, key, config.r)) for key in keys
        ]
        return False

    def set_scaling(self, value: float) -> bool:
        for layout, scaling in zip(self.cell_layouts, self.scalings, strict=True):
            assign(self.pair_of(layout).factor, np.array(value * scaling, np.float32))
        return super().set_scaling(value)

    # The slot holds A and B of experts as `Layout.to_slot` has them.

    def attribute_of(self, tensor: str) -> str:
        prefix = self.layout_of[tensor].prefix  # where `base_layer` is, the cell is
        return f"pair_{self.layout_of[tensor].attribute}.{tensor.removeprefix(prefix)}" if prefix else tensor

    def pair_of(self, layout: Layout) -> nn.Cell:
        """What holds a parameter's A and B: the slot itself for the last one."""
        return getattr(self, f"pair_{layout.attribute}") if layout.prefix else self

    def reserve(self, shapes: Shapes) -> bool:
        empty = {name: np.empty(shape, np.float16) for name, shape in shapes.items()}
        return super().reserve({k: self.layout_of[k].to_slot(k, v).shape for k, v in empty.items()})

    def fill(self, tensors: Mapping[str, np.ndarray], trained: frozenset[str]) -> None:
        super().fill({k: self.layout_of[k].to_slot(k, v) for k, v in tensors.items()}, trained)

    def read(self, shapes: Shapes) -> Tensors:
        empty = {name: np.empty(shape, np.float16) for name, shape in shapes.items()}
        cut = {name: self.layout_of[name].to_slot(name, value).shape for name, value in empty.items()}
        return {name: self.layout_of[name].to_file(name, v) for name, v in super().read(cut).items()}

    def release(self) -> None:
        restore(original(self.base_layer))

    def construct(self, *arguments: Any, **named: Any) -> Any:
        return self.base_layer(*arguments, **named)


@cache
def layer_of(parameters: tuple[tuple[str, str], ...]) -> type[LoraParameters]:
    """The layer for some of a cell's parameters, (key, attribute) in the order of the cell."""
    return type("LoraParameters", (LoraParameters,), {"PARAMETERS": parameters, "__module__": __name__})


class AdaptsParameters:
    """What a config with PEFT's key ``target_parameters`` needs."""

    def check_target_parameters(self) -> None:
        """Raise ``InputError`` for anything but a list of names."""
        name_set(self.target_parameters, "target_parameters", allow_text=False)

    def resolve(self, base: BaseModel) -> None:
        if (
            self.target_parameters
            and self.target_modules is None
            and base.model_type not in self.DEFAULT_TARGETS
        ):
            return  # parameters alone
        super().resolve(base)

    def target_cells(self, base: BaseModel) -> dict[str, nn.Cell]:
        if self.target_parameters and not self.target_modules:
            return {}
        return super().target_cells(base)

    def parameter_slots(self, base: BaseModel, wrapped: Collection[str]) -> dict[str, type[Slot]]:
        """The layers' classes for the parameters, by the paths of their cells.

        Args:
            wrapped: the paths of the cells that the adapter wraps otherwise.

        Raises:
            InputError: no parameter is meant, or one that can't be adapted.
        """
        if not self.target_parameters:
            return {}
        ends = tuple(f".{name}" for name in self.target_parameters)
        keys = [key for key in base.places if key in self.target_parameters or key.endswith(ends)]
        _check_found(self.target_parameters, keys, base, alone=not wrapped)
        if keys:
            self._check_others()
        found: dict[str, tuple[tuple[str, str], ...]] = {}
        for key in keys:
            path, _, leaf = key.rpartition(".")
            self._check_place(base, key, path, wrapped)
            found[path] = (*found.get(path, ()), (leaf, base.places[key].attribute))
        for path, parameters in found.items():
            if self.bias != "none" and len(parameters) > 1 and f"{path}.bias" in base.places:
                raise InputError(f"bias={self.bias!r} is not possible with two parameters of {path!r}")
        return {path: layer_of(parameters) for path, parameters in found.items()}

    def _check_others(self) -> None:
        """Refuse, as PEFT does, what can't be had with a parameter."""
        for key in ("lora_dropout", "lora_bias", "use_dora", "fan_in_fan_out"):
            if getattr(self, key):
                raise InputError(f"{key}={getattr(self, key)!r} is not possible with target_parameters")

    def _check_place(self, base: BaseModel, key: str, path: str, wrapped: Collection[str]) -> None:
        if not path:
            raise InputError(f"target_parameters: {key!r} belongs to the whole model, not to a cell of it")
        if path in wrapped:
            raise InputError(
                f"target_parameters: the cell of {key!r} is a target of target_modules (or of "
                "trainable_token_indices) too; leave it out there (target_modules=[] means no cell)"
            )
        if path in saved_modules(self, base.cells):
            raise InputError(f"target_parameters: the cell of {key!r} is saved whole (modules_to_save)")
        shape = base.places[key].parameter.shape
        if len(shape) not in (2, 3):
            raise InputError(f"target_parameters: {key!r} is {tuple(shape)}, and must have 2 or 3 axes")
        old = re.match(r"0\.1[0-8]\b", str(self.peft_version))
        if old and len(shape) == 3 and not getattr(base.cells[path], "is_transposed", False):
            raise InputError(
                f"target_parameters: PEFT {self.peft_version} took {key!r} for (experts, in, out), and "
                "PEFT since 0.19 does not; such an adapter can't be read"
            )


def _check_found(wanted: list[str], keys: list[str], base: BaseModel, alone: bool) -> None:
    """Name what no parameter's name ends with: in an error if the adapter has nothing else, in a warning."""
    for name in wanted:
        if any(key == name or key.endswith(f".{name}") for key in keys):
            continue
        parts = name.count(".") + 1
        ends = sorted({".".join(key.split(".")[-parts:]) for key in base.places})
        message = f"target_parameters: no parameter is called {name!r}{did_you_mean(name, ends)}"
        if alone and not keys:
            raise InputError(message)
        logger.warning(message)
