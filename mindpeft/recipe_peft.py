"""The ``peft`` section of a recipe: which methods, and their configs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from mindpeft.errors import InputError
from mindpeft.recipe_values import build, check_choice, checked_values, field_hints

if TYPE_CHECKING:
    from mindpeft.config import PeftConfig

# Keys of a PeftConfig that the program writes.
_WRITTEN_BY_PROGRAM = {
    "auto_mapping",
    "peft_version",
    "base_model_name_or_path",
    "inference_mode",
    "revision",
}


def method_name(peft_type: str) -> str:
    """The name of a method in recipes: ``LORA`` is ``lora``."""
    return peft_type.lower()


def read_methods(section: Any, task_type: str | None, because: str) -> list[PeftConfig]:
    """The configs that a ``peft`` section means, one for each method.

    Args:
        section: a mapping, or a list of such for a hybrid, or the preset of one alone.
        task_type: the one that fits the data.
        because: what it follows from, for the message.

    Raises:
        InputError: an unknown method or key, or a bad value.
    """
    methods = section if isinstance(section, list) else [section]
    if isinstance(section, dict) and "preset" in section and not section.keys() & {"method", "peft_type"}:
        methods = _hybrid_preset(section)
    if not methods or not all(isinstance(values, dict) for values in methods):
        raise InputError("peft must be a mapping with the key method, or a list of such mappings")
    return [_read_method(values, task_type, because) for values in methods]


def _hybrid_preset(section: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The parts of the hybrid that a preset alone means."""
    from mindpeft.config import HYBRID_PRESETS

    check_choice("peft.preset", section["preset"], HYBRID_PRESETS)
    if len(section) > 1:
        more = ", ".join(f"peft.{key}" for key in section if key != "preset")
        raise InputError(f"{more} can't go with the preset of a hybrid; write its parts out as a list")
    return HYBRID_PRESETS[section["preset"]]


def _read_method(section: Mapping[str, Any], task_type: str | None, because: str) -> PeftConfig:
    config_class = _method_class(section)
    allowed = field_hints(config_class, without=_WRITTEN_BY_PROGRAM | {"peft_type"})
    also = ("method", "preset") if config_class.PRESETS else ("method",)
    values = {key: value for key, value in section.items() if key not in (*also, "peft_type")}
    values = checked_values("peft", values, allowed, also)
    if values.setdefault("task_type", task_type) != task_type:
        raise InputError(f"peft.task_type must be {task_type} for {because}; leave it out")
    return build("peft", config_class, values)


def _method_class(values: Mapping[str, Any]) -> type[PeftConfig]:
    """The config class that ``method`` (or ``peft_type``) names, or that of its ``preset``."""
    from mindpeft.config import supported_methods

    classes = {method_name(method.value): config for method, config in supported_methods().items()}
    keys = [key for key in ("method", "peft_type") if key in values]
    if not keys:
        raise InputError(f"peft.method is missing; methods: {', '.join(sorted(classes))}")
    names = {method_name(str(values[key])) for key in keys}
    if len(names) > 1:
        raise InputError("peft.method and peft.peft_type name two methods; leave one out")
    name = names.pop()
    check_choice(f"peft.{keys[0]}", name, classes)
    presets = classes[name].PRESETS
    if not presets or "preset" not in values:
        return classes[name]
    check_choice("peft.preset", values["preset"], presets)
    return presets[values["preset"]]
