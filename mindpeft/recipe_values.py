"""Checking a recipe's values against type hints, and saying in plain words what is wrong."""

from __future__ import annotations

import re
import types
from collections.abc import Iterable, Mapping
from dataclasses import MISSING, fields
from enum import Enum
from typing import Any, Union, get_args, get_origin, get_type_hints

from mindpeft.errors import InputError, did_you_mean

# YAML 1.1 reads 1e-3 (no dot) as text, which nobody who writes a learning rate means.
_NUMBER = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?")
_WORDS = {str: "text", int: "a whole number", float: "a number", bool: "true or false", type(None): "null"}


def fit(path: str, value: Any, hint: Any) -> Any:
    """Return ``value`` as the type that ``hint`` asks for.

    Args:
        path: the key's dotted path, for the message.
        value: what YAML gave.
        hint: a resolved type hint of a dataclass field.

    Raises:
        InputError: the value is of another kind.
    """
    try:
        return _fit(value, hint)
    except (TypeError, ValueError):
        quote = " (YAML reads a bare yes, no, on or off as true or false; put it in quotes)"
        hint_to_quote = quote if isinstance(value, bool) and _takes_text(hint) else ""
        raise InputError(f"{path} must be {describe(hint)}, not {value!r}{hint_to_quote}") from None


def describe(hint: Any) -> str:
    """A type hint in words: ``"a list of text or null"``."""
    arguments, origin = get_args(hint), get_origin(hint)
    if origin in (Union, types.UnionType):
        return " or ".join(dict.fromkeys(describe(argument) for argument in arguments))
    if origin in (list, set, tuple):
        return f"a list of {describe(arguments[0])}"
    if origin is dict or hint is dict:
        return "a mapping"
    return _WORDS.get(hint, "text")


def _takes_text(hint: Any) -> bool:
    return hint is str or any(_takes_text(argument) for argument in get_args(hint))


def _fit(value: Any, hint: Any) -> Any:
    arguments, origin = get_args(hint), get_origin(hint)
    if origin in (Union, types.UnionType):
        return _fit_any(value, arguments)
    if origin in (list, set, tuple):
        return _fit_sequence(value, origin, arguments)
    if origin is dict:
        return {_fit(key, arguments[0]): _fit(item, arguments[1]) for key, item in _is(value, dict).items()}
    if hint is Any:
        return value
    if hint is float:
        return _fit_number(value)
    if isinstance(hint, type) and issubclass(hint, Enum):
        return _is(value, str)  # the config that owns the enum names its members
    return _is(value, hint)


def _fit_any(value: Any, hints: tuple[Any, ...]) -> Any:
    for hint in hints:
        try:
            return _fit(value, hint)
        except (TypeError, ValueError):
            continue
    raise TypeError


def _fit_sequence(value: Any, kind: type, arguments: tuple[Any, ...]) -> Any:
    items = _is(value, list if kind is tuple else kind)
    if kind is tuple:
        return tuple(_fit(item, argument) for item, argument in zip(items, arguments, strict=True))
    return kind(_fit(item, arguments[0]) for item in items)


def _fit_number(value: Any) -> int | float:
    if isinstance(value, str) and _NUMBER.fullmatch(value):
        return float(value)
    return value if isinstance(value, int) and not isinstance(value, bool) else _is(value, float)


def _is(value: Any, kind: type) -> Any:
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        raise TypeError
    return value


def field_hints(owner: type, without: Iterable[str] = ()) -> dict[str, Any]:
    """Field name -> resolved type hint of a dataclass."""
    hints = get_type_hints(owner)
    return {entry.name: hints[entry.name] for entry in fields(owner) if entry.name not in set(without)}


def checked_values(
    section: str, values: Mapping[str, Any], hints: Mapping[str, Any], also: tuple[str, ...] = ()
) -> dict[str, Any]:
    """The values fitted to their hints; a key that is not among them is refused with the nearest one."""
    prefix = f"{section}." if section else ""
    allowed = [*also, *hints]
    for key in values:
        if key not in hints:
            raise InputError(
                f"unknown key {f'{prefix}{key}'!r}{did_you_mean(str(key), allowed)}; "
                f"allowed{f' in {section}' if section else ''}: {', '.join(allowed)}"
            )
    return {key: fit(f"{prefix}{key}", value, hints[key]) for key, value in values.items()}


def build(section: str, owner: type, values: dict[str, Any]) -> Any:
    """Make a dataclass; its own complaints get the section's name before them."""
    missing = [
        entry.name
        for entry in fields(owner)
        if entry.name not in values and entry.default is MISSING and entry.default_factory is MISSING
    ]
    if missing:
        raise InputError(f"{section}.{missing[0]} is missing")
    try:
        return owner(**values)
    except InputError as error:
        text = str(error)
        raise InputError(text if text.startswith(section) else f"{section}: {text}") from error


def check_choice(path: str, value: str, choices: Iterable[str]) -> None:
    """Raise ``InputError`` unless ``value`` is one of ``choices``."""
    choices = list(choices)
    if value not in choices:
        raise InputError(
            f"{path} must be one of {', '.join(choices)}, not {value!r}{did_you_mean(value, choices)}"
        )
