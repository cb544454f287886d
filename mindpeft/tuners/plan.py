"""What a config means for a model, worked out from the bare model before anything is touched."""

from __future__ import annotations

import copy
import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass

from mindspore import nn

from mindpeft.config import PeftConfig
from mindpeft.errors import InputError
from mindpeft.parameters import Place, base_places
from mindpeft.targets import find_targets, output_head_names, resolve_targets, saved_modules
from mindpeft.tuners.adapted_value import is_adapted
from mindpeft.tuners.base import Shapes, Site, Slot, is_linear
from mindpeft.tuners.int8 import check_int8


@dataclass(frozen=True)
class Plan:
    """What a config means for a model.

    Attributes:
        config: the config with its targets resolved.
        classes: path of each changed cell -> the class of its slot; "" is the model itself.
        sites: path -> what the method may look at there.
        shapes: path -> the adapter's tensors there.
        saved: the paths of the cells that ``modules_to_save`` means.
        copies: the base parameters in those cells.
        selected: the base parameters that the method trains where they are.
    """

    config: PeftConfig
    classes: dict[str, type[Slot]]
    sites: dict[str, Site]
    shapes: dict[str, Shapes]
    saved: list[str]
    copies: list[str]
    selected: list[str]

    @property
    def replaced(self) -> set[str]:
        """The base parameters that the adapter trains and keeps values of its own for."""
        return {*self.copies, *self.selected}

    @property
    def trainable(self) -> int:
        """How many numbers of the method's own tensors are trained."""
        return sum(
            math.prod(shapes[name])
            for path, shapes in self.shapes.items()
            for name in self.classes[path].trained(self.sites[path], shapes)
        )

    @property
    def wrapped(self) -> set[str]:
        """The paths of the cells inside the model that get a layer around them."""
        return set(self.classes) - {""}


class BaseModel:
    """The cells and parameters of a model as they were before any adapter, by their Hugging Face names."""

    def __init__(self, model: nn.Cell) -> None:
        self.model = model
        self.cells: dict[str, nn.Cell] = {name: cell for name, cell in model.cells_and_names() if name}
        self.places: dict[str, Place] = base_places(model)
        self.size = self.count(self.places)

    def name_of(self, cell: nn.Cell, attribute: str) -> str:
        """The name of the parameter that a cell has as that attribute."""
        return next(
            name for name, place in self.places.items() if place.cell is cell and place.attribute == attribute
        )

    @property
    def model_type(self) -> str | None:
        """The architecture's name in ``config.json``, if the model has a config."""
        return getattr(getattr(self.model, "config", None), "model_type", None)

    @property
    def name(self) -> str | None:
        """Where the model came from, if it knows."""
        config = getattr(self.model, "config", None)
        name = getattr(self.model, "name_or_path", None) or getattr(config, "name_or_path", None)
        return str(name) if name else None

    @property
    def auto_mapping(self) -> dict[str, str]:
        """The model's class as PEFT writes it; ours bear the names of transformers' classes."""
        library = type(self.model).__module__ if self.model_type is None else "transformers"
        return {"base_model_class": type(self.model).__name__, "parent_library": library}

    def count(self, names: Collection[str]) -> int:
        """How many numbers these parameters hold; tied ones count once, running statistics don't."""
        places = [self.places[name] for name in names if not self.places[name].is_statistic]
        return sum({id(place.parameter): place.parameter.size for place in places}.values())

    def shared_names(self) -> dict[int, list[str]]:
        """The names of each parameter that has several, by its id."""
        names: dict[int, list[str]] = {}
        for name, place in self.places.items():
            names.setdefault(id(place.parameter), []).append(name)
        return {key: found for key, found in names.items() if len(found) > 1}

    def targets(self, config: PeftConfig) -> dict[str, nn.Cell]:
        """The cells that a config with resolved ``target_modules`` means.

        Raises:
            InputError: there are none, or one computes with adapted values of its parameters.
        """
        found = {path: self.cells[path] for path in find_targets(config, self.cells)}
        taken = next((path for path, cell in found.items() if is_adapted(cell)), None)
        if taken is not None:
            raise InputError(
                f"{taken!r} has parameters that another adapter adapts (target_parameters); unload() the "
                "model first"
            )
        return found

    def resolve_targets(self, config: PeftConfig, defaults: Mapping[str, list[str] | str]) -> set[str] | str:
        """A config's ``target_modules`` with defaults filled in and "all-linear" spelled out.

        Raises:
            InputError: none are set and there is no default for this model type.
        """
        return resolve_targets(
            config, self.cells, lambda: self._linear_names(config), self.model_type, defaults
        )

    def _linear_names(self, config: PeftConfig) -> set[str]:
        """What "all-linear" means here."""
        linear = {name for name, cell in self.cells.items() if is_linear(cell)}
        return linear - output_head_names(self.model, self.cells, config.task_type)

    def plan(self, config: PeftConfig, from_file: bool = False) -> Plan:
        """Work out what a config means for this model.

        Args:
            config: left as it is; the plan holds a copy, filled in.
            from_file: the adapter's tensors come from a file.

        Raises:
            InputError: no cell matches, or one can't be wrapped by the method.
        """
        config = copy.deepcopy(config)
        config.resolve(self)
        if from_file:
            config.check_file()
        classes = config.slot_classes(self)
        targets = {path: self.cells[path] for path in classes if path}
        sites = {
            path: Site(self.cells[path] if path else self.model, path, config, targets) for path in classes
        }
        shapes = {
            path: cls.file_shapes(sites[path]) if from_file else cls.tensor_shapes(sites[path])
            for path, cls in classes.items()
        }
        saved = saved_modules(config, self.cells)
        copies = [name for name in self.places if any(name.startswith(f"{path}.") for path in saved)]
        selected = config.selected(self, set(targets))
        plan = Plan(config, classes, sites, shapes, saved, copies, selected)
        check_int8(plan, self.places)
        return plan
