"""What the configs of methods with ``target_modules`` share."""

from __future__ import annotations

import logging
import re
import sys
from collections.abc import Collection, Mapping
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, ClassVar

from mindspore import nn

from mindpeft.config import PeftConfig, add_task_heads
from mindpeft.errors import InputError, did_you_mean
from mindpeft.targets import LORA_TARGETS
from mindpeft.tuners.base import is_linear, is_transposed

if TYPE_CHECKING:
    from mindpeft.tuners.base import Slot
    from mindpeft.tuners.plan import BaseModel

_LARGEST = sys.float_info.max  # JSON's whole numbers can be larger

logger = logging.getLogger(__name__)


@dataclass
class TargetedConfig(PeftConfig):
    """A config that names the cells to wrap.

    A method's config adds those of ``exclude_modules``, ``layers_to_transform``, ``layers_pattern``,
    ``rank_pattern``, ``alpha_pattern``, ``bias`` and ``fan_in_fan_out`` that Hugging Face PEFT has for it;
    they act and are checked as soon as they are there.

    Attributes:
        target_modules: names or dotted suffixes of cells, or a regular expression for the full path, or
            "all-linear"; ``None`` takes the model type's default.
        modules_to_save: cells trained and saved whole (a fresh head).

    Raises:
        InputError: a value is not allowed, or keys contradict each other.
    """

    target_modules: set[str] | list[str] | str | None = None
    modules_to_save: list[str] | None = None

    # The targets of a model type when ``target_modules`` is None.
    DEFAULT_TARGETS: ClassVar[Mapping[str, list[str] | str]] = LORA_TARGETS
    # The ``bias`` that trains the wrapped cells' biases alone.
    BIAS_ONLY: ClassVar[str] = "lora_only"

    def __post_init__(self) -> None:
        super().__post_init__()
        for key in ("target_modules", "exclude_modules"):
            if hasattr(self, key):
                setattr(self, key, name_set(getattr(self, key), key))
        saved = name_set(self.modules_to_save, "modules_to_save", allow_text=False)
        saved = None if saved is None else list(self.modules_to_save)
        self.modules_to_save = add_task_heads(self.task_type, saved)
        self._check_layers()
        self._check_patterns()
        if hasattr(self, "bias"):
            check_choice("bias", self.bias, ("none", "all", self.BIAS_ONLY))

    def _check_layers(self) -> None:
        pattern, layers = (getattr(self, key, None) for key in ("layers_pattern", "layers_to_transform"))
        for key, value in (("layers_to_transform", layers), ("layers_pattern", pattern)):
            if isinstance(self.target_modules, str) and value is not None:
                raise InputError(f"{key} can't be used when target_modules is a string; give a list of names")
        if pattern and layers is None:
            raise InputError("layers_pattern needs layers_to_transform: the indices of the layers to adapt")
        if pattern is not None:
            name_set([pattern] if isinstance(pattern, str) else pattern, "layers_pattern", allow_text=False)
        if layers is not None and not all(
            type(i) is int for i in (layers if isinstance(layers, list) else [layers])
        ):
            raise InputError(f"layers_to_transform must be an integer or a list of integers, not {layers!r}")

    def _check_patterns(self) -> None:
        """Refuse keys of ``rank_pattern`` and its like that are no regular expressions."""
        for entry in fields(self):
            if entry.name.endswith("_pattern") and isinstance(getattr(self, entry.name), Mapping):
                for pattern in getattr(self, entry.name):
                    check_expression(f"each key of {entry.name}", pattern)

    def slot_class(self, cell: nn.Cell, path: str) -> type[Slot]:
        """The class that wraps a targeted cell.

        Raises:
            InputError: the method can't wrap this kind of cell, or not with this config.
        """
        raise NotImplementedError

    def resolve(self, base: BaseModel) -> None:
        self.target_modules = base.resolve_targets(self, self.DEFAULT_TARGETS)
        if hasattr(self, "fan_in_fan_out"):
            self._tell_layout(base)

    def _tell_layout(self, base: BaseModel) -> None:
        """Set ``fan_in_fan_out`` as PEFT leaves it: what the last linear cell's weight is."""
        linear = [cell for cell in self.target_cells(base).values() if is_linear(cell)]
        if linear:
            transposed = is_transposed(linear[-1])
            if transposed != self.fan_in_fan_out:
                logger.warning("fan_in_fan_out is %s: the targeted cells' weights are so", transposed)
            self.fan_in_fan_out = transposed

    def slot_classes(self, base: BaseModel) -> dict[str, type[Slot]]:
        return {path: self.slot_class(cell, path) for path, cell in self.target_cells(base).items()}

    def target_cells(self, base: BaseModel) -> dict[str, nn.Cell]:
        """The cells that ``target_modules`` means, by path."""
        return base.targets(self)

    def selected(self, base: BaseModel, wrapped: Collection[str]) -> list[str]:
        kind = getattr(self, "bias", "none")
        if kind == "none":
            return []
        biases = [name for name in base.places if name == "bias" or name.endswith(".bias")]
        return biases if kind == "all" else [name for name in biases if name.rpartition(".")[0] in wrapped]


def name_set(value: Any, key: str, allow_text: bool = True) -> Any:
    """A list of names as a set; text (a regular expression) and ``None`` as they are."""
    if value is None or (allow_text and isinstance(value, str)):
        return value
    if not isinstance(value, list | tuple | set) or not all(isinstance(name, str) for name in value):
        kinds = "a list of names or a regular expression" if allow_text else "a list of names"
        raise InputError(f"{key} must be {kinds}, not {value!r}")
    return set(value)


def check_expression(key: str, value: str) -> None:
    """Raise ``InputError`` unless ``value`` is a regular expression."""
    try:
        re.compile(value)
    except re.error as error:
        raise InputError(f"{key} must be a regular expression, not {value!r}: {error}") from error


def check_choice(key: str, value: Any, choices: Collection[Any]) -> None:
    """Raise ``InputError`` unless ``value`` is one of ``choices``."""
    if value not in choices:
        allowed = ", ".join(map(str, choices))
        raise InputError(f"{key} must be one of {allowed}, not {value!r}{did_you_mean(value, choices)}")


def check_count(key: str, value: Any, least: int = 1) -> None:
    """Raise ``InputError`` unless ``value`` is an integer of at least ``least``."""
    if type(value) is not int or value < least:
        kind = {0: "an integer, 0 or more", 1: "a positive integer"}.get(
            least, f"an integer of {least} or more"
        )
        raise InputError(f"{key} must be {kind}, not {value!r}")


def check_number(key: str, value: Any) -> None:
    """Raise ``InputError`` unless ``value`` is a finite number."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) <= _LARGEST:
        raise InputError(f"{key} must be a number, not {value!r}")


def check_rate(key: str, value: Any) -> None:
    """Raise ``InputError`` unless ``value`` is a dropout rate."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < 1:
        raise InputError(f"{key} must lie in [0, 1), not {value!r}")
