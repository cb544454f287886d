"""Label names and their ids: learnt from the training data, saved with the run, used by eval and predict."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from mindpeft.errors import InputError, did_you_mean
from mindpeft.files import read_json, write_json


@dataclass(frozen=True)
class LabelMap:
    """The names of the labels; a label's id is its place."""

    names: tuple[str, ...]

    def __post_init__(self):
        if len(set(self.names)) < len(self.names):
            raise InputError(f"label names must differ: {', '.join(self.names)}")

    def __len__(self) -> int:
        return len(self.names)

    @classmethod
    def learn(cls, values: Iterable[Any]) -> LabelMap:
        """The map of all labels in ``values``: in numeric order if all are integers, else sorted by name."""
        names = {label_name(value) for value in values}
        numeric = all(_is_integer(name) for name in names)
        return cls(tuple(sorted(names, key=int) if numeric else sorted(names)))

    @classmethod
    def from_names(cls, names: Sequence[Any]) -> LabelMap:
        """The map of given names, in their order."""
        return cls(tuple(label_name(name) for name in names))

    @classmethod
    def from_dict(cls, value: dict[str, Any]) -> LabelMap:
        """The map in a Hugging Face config: its ``id2label``, or its ``label2id``.

        Raises:
            InputError: neither is there, or the ids are not 0, 1, 2...
        """
        if isinstance(value.get("id2label"), dict):
            pairs = [(key, name) for key, name in value["id2label"].items()]
        elif isinstance(value.get("label2id"), dict):
            pairs = [(key, name) for name, key in value["label2id"].items()]
        else:
            raise InputError("a label map needs id2label or label2id, an object")
        ids = {int(key): str(name) for key, name in pairs if _is_integer(str(key))}
        if len(ids) < len(pairs) or sorted(ids) != list(range(len(ids))):
            raise InputError(f"label ids must be 0, 1, 2...: {', '.join(str(key) for key, _ in pairs)}")
        return cls(tuple(ids[index] for index in range(len(ids))))

    @classmethod
    def load(cls, path: str | os.PathLike) -> LabelMap:
        """Read a map that ``save`` wrote, or any JSON object with ``id2label`` (a ``config.json``, say)."""
        value = read_json(path)
        try:
            return cls.from_dict(value if isinstance(value, dict) else {})
        except InputError as error:
            raise InputError(f"{path}: {error}") from error

    def save(self, path: str | os.PathLike) -> None:
        """Write the map as JSON with ``id2label`` and ``label2id``."""
        write_json(path, self.to_dict())

    def to_dict(self) -> dict[str, dict]:
        """``id2label`` and ``label2id`` as a Hugging Face config has them."""
        return {"id2label": self.id2label, "label2id": self.label2id}

    @property
    def id2label(self) -> dict[int, str]:
        """Id -> name."""
        return dict(enumerate(self.names))

    @cached_property
    def label2id(self) -> dict[str, int]:
        """Name -> id."""
        return {name: index for index, name in enumerate(self.names)}

    def id_of(self, value: Any) -> int:
        """The id of a label, given by name; or by id, where no name is a number.

        Raises:
            InputError: no such label; the message has the nearest name.
        """
        name = label_name(value)
        if name in self.label2id:
            return self.label2id[name]
        by_id = _is_integer(name) and not any(_is_integer(other) for other in self.names)
        if by_id and 0 <= int(name) < len(self):
            return int(name)
        shown = ", ".join(self.names[:10]) + (", ..." if len(self) > 10 else "")
        raise InputError(f"unknown label {name!r}: the labels are {shown}{did_you_mean(name, self.names)}")


def label_name(value: Any) -> str:
    """A label as text: JSON's ``true`` and ``1`` are labels as well as CSV's."""
    return str(value).lower() if isinstance(value, bool) else str(value).strip()


def _is_integer(name: str) -> bool:
    return name.removeprefix("-").isdecimal()
