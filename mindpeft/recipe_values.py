"""Checking one value of a recipe against a type hint, and saying in plain words what was expected."""

from __future__ import annotations

import re
import types
from enum import Enum
from typing import Any, Union, get_args, get_origin

from mindpeft.errors import InputError

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
