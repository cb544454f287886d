"""What a config means for a model, worked out from the bare model before anything is touched."""

from __future__ import annotations

import copy
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from mindspore import nn

from mindpeft.config import PeftConfig
from mindpeft.errors import InputError
from mindpeft.parameters import Place, base_places
from mindpeft.targets import find_targets, output_head_names, resolve_targets, saved_modules
from mindpeft.tuners.base import Shapes, TunerLayer, is_linear


@dataclass(frozen=True)
class Plan:
    """What a config means for a model.

    Attributes:
        config: the config with its targets resolved.
        classes: path of each targeted cell -> the class that wraps it.
        shapes: path -> the adapter's tensors there.
        saved: the paths of the cells that ``modules_to_save`` means.
        copies: the base parameters in those cells.
        biases: the base model's biases that the adapter trains.
    """

    config: PeftConfig
    classes: dict[str, type[TunerLayer]]
    shapes: dict[str, Shapes]
    saved: list[str]
    copies: list[str]
    biases: list[str]

    @property
    def trained(self) -> set[str]:
        """The base parameters that the adapter trains."""
        return {*self.copies, *self.biases}


class BaseModel:
    """The cells and parameters of a model as they were before any adapter, by their Hugging Face names."""

    def __init__(self, model: nn.Cell) -> None:
        self.model = model
        self.cells: dict[str, nn.Cell] = {name: cell for name, cell in model.cells_and_names() if name}
        self.places: dict[str, Place] = base_places(model)
        self.size = self.count(self.places)

    def count(self, names: Collection[str]) -> int:
        """How many numbers these parameters hold; tied ones count once, running statistics don't."""
        places = [self.places[name] for name in names if not self.places[name].is_statistic]
        return sum({id(place.parameter): place.parameter.size for place in places}.values())

    def plan(self, config: PeftConfig, wrapped: Mapping[str, TunerLayer]) -> Plan:
        """Work out what a config means for this model.

        Args:
            config: left as it is; the plan holds a copy with its targets resolved.
            wrapped: the cells that are wrapped already.

        Raises:
            InputError: no cell matches, or one can't be wrapped by the method.
        """
        config = copy.deepcopy(config)
        model_type = getattr(getattr(self.model, "config", None), "model_type", None)
        config.target_modules = resolve_targets(
            config, self.cells, lambda: self._linear_names(config), model_type
        )
        classes = {
            path: config.layer_class(self.cells[path], path) for path in find_targets(config, self.cells)
        }
        for path, layer_class in classes.items():
            if path in wrapped and type(wrapped[path]) is not layer_class:
                raise InputError(f"the cell {path!r} is already wrapped by {type(wrapped[path]).__name__}")
        config.describe_cells([self.cells[path] for path in classes])
        shapes = {path: cls.tensor_shapes(self.cells[path], config, path) for path, cls in classes.items()}
        saved = saved_modules(config, self.cells)
        copies = [name for name in self.places if any(name.startswith(f"{path}.") for path in saved)]
        return Plan(config, classes, shapes, saved, copies, self._biases(config, classes))

    def _linear_names(self, config: PeftConfig) -> set[str]:
        """What "all-linear" means here."""
        linear = {name for name, cell in self.cells.items() if is_linear(cell)}
        return linear - output_head_names(self.model, self.cells, config.task_type)

    def _biases(self, config: PeftConfig, wrapped: Collection[str]) -> list[str]:
        """The base model's biases that ``config.bias`` means."""
        kind: Any = getattr(config, "bias", "none")
        if kind == "none":
            return []
        biases = [name for name in self.places if name == "bias" or name.endswith(".bias")]
        return biases if kind == "all" else [name for name in biases if name.rpartition(".")[0] in wrapped]
