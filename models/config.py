"""What every architecture's configuration shares: reading and writing ``config.json``."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from types import NoneType
from typing import Any, ClassVar, get_args, get_origin, get_type_hints

from mindpeft.errors import InputError, did_you_mean
from mindpeft.files import read_json, write_json

CONFIG_NAME = "config.json"
PROBLEM_TYPES = ("regression", "single_label_classification", "multi_label_classification")


@dataclass
class PretrainedConfig:
    """Keys of ``config.json`` that no architecture owns; unknown keys are kept and written back.

    Attributes:
        id2label: class number to name; its length is ``num_labels``.
        problem_type: ``single_label_classification``, ``multi_label_classification``, ``regression`` or None
            (decided by ``num_labels`` and the labels' dtype, as Hugging Face does).
        name_or_path: where the model came from; adapters note it as their base.
        extra: keys that this class does not know.
    """

    model_type: ClassVar[str] = ""

    id2label: dict[int, str] = field(default_factory=lambda: {0: "LABEL_0", 1: "LABEL_1"})
    problem_type: str | None = None
    name_or_path: str = ""
    extra: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        hints = get_type_hints(type(self))
        for entry in fields(self):
            value = getattr(self, entry.name)
            _check_type(entry.name, value, hints[entry.name])
            self._check_range(entry.name, value, hints[entry.name])
        self.id2label = _read_labels(self.id2label)
        if self.problem_type not in (None, *PROBLEM_TYPES):
            raise InputError(
                f"problem_type must be null or one of {', '.join(PROBLEM_TYPES)}, not {self.problem_type!r}"
                + did_you_mean(self.problem_type, PROBLEM_TYPES)
            )

    def _check_range(self, key: str, value: Any, hint: Any) -> None:
        """Refuse impossible numbers, told by the kind of key: a rate, a token's number, a size, a scale."""
        if isinstance(value, bool) or not isinstance(value, int | float):
            return
        low, below = 0, math.inf
        if "dropout" in key:
            below = 1
        elif key.endswith("_token_id"):
            below = getattr(self, "vocab_size", math.inf)
        elif hint is int:
            low = 1
        if not low <= value < below:
            upper = "" if below == math.inf else f" and less than {below}"
            raise InputError(f"{key} must be at least {low}{upper}, not {value}")

    @property
    def num_labels(self) -> int:
        return len(self.id2label)

    @num_labels.setter
    def num_labels(self, count: int) -> None:
        if type(count) is not int or count < 1:
            raise InputError(f"num_labels must be an integer of at least 1, not {count!r}")
        if count != len(self.id2label):
            self.id2label = {number: f"LABEL_{number}" for number in range(count)}

    @property
    def label2id(self) -> dict[str, int]:
        return {name: number for number, name in self.id2label.items()}

    @classmethod
    def from_dict(cls, values: dict[str, Any], **overrides: Any) -> PretrainedConfig:
        """Build a configuration.

        Args:
            values: the keys of a ``config.json``.
            overrides: keys that win over it, also ``num_labels``.

        Raises:
            InputError: a value of the wrong type or out of range, or an override that is no key.
        """
        try:
            config = cls._from_file(values)
        except InputError as error:
            where = f"{overrides['name_or_path']}/{CONFIG_NAME}: " if "name_or_path" in overrides else ""
            raise InputError(f"{where}{error}") from error
        return config._overridden(overrides)

    @classmethod
    def _from_file(cls, values: dict[str, Any]) -> PretrainedConfig:
        found = values.get("model_type", cls.model_type)
        if found != cls.model_type:
            raise InputError(f"model_type is {found!r}, but {cls.__name__} reads {cls.model_type!r}")
        known = cls._keys()
        config = cls(
            **{key: value for key, value in values.items() if key in known},
            extra={
                key: value
                for key, value in values.items()
                if key not in known | {"model_type", "num_labels", "label2id"}
            },
        )
        if "num_labels" in values:
            config.num_labels = values["num_labels"]
        return config

    def _overridden(self, overrides: dict[str, Any]) -> PretrainedConfig:
        known = {*self._keys(), "num_labels", "label2id"}
        for key in overrides:
            if key not in known | self.extra.keys():
                raise InputError(
                    f"{type(self).__name__} has no key {key!r}{did_you_mean(key, known | self.extra.keys())}"
                )
        changed = {key: value for key, value in overrides.items() if key in self._keys()}
        if "label2id" in overrides:
            changed.setdefault("id2label", {number: name for name, number in overrides["label2id"].items()})
        kept = {key: value for key, value in overrides.items() if key not in known}
        config = replace(self, **changed, extra={**self.extra, **kept})
        if "num_labels" in overrides:
            config.num_labels = overrides["num_labels"]
        return config

    @classmethod
    def _keys(cls) -> set[str]:
        return {entry.name for entry in fields(cls)} - {"extra"}

    def to_dict(self) -> dict[str, Any]:
        """Return the keys of ``config.json``; what is none by default is left out where it is none."""
        own = {entry.name: getattr(self, entry.name) for entry in fields(self)}
        for entry in fields(self):
            if entry.default is None and own[entry.name] is None:
                del own[entry.name]  # some classes of transformers stumble over a null
        own.pop("extra")
        own.pop("name_or_path")
        own["id2label"] = {str(number): name for number, name in self.id2label.items()}
        return {**self.extra, **own, "label2id": self.label2id, "model_type": self.model_type}

    def save_pretrained(self, folder: str | os.PathLike) -> None:
        """Write ``config.json`` into ``folder``."""
        write_json(Path(folder) / CONFIG_NAME, self.to_dict())


def _check_type(key: str, value: Any, hint: Any) -> None:
    union = get_args(hint)
    allowed = [get_origin(kind) or kind for kind in (union if NoneType in union else (hint,))]
    fits = any(isinstance(value, kind) for kind in allowed)
    if isinstance(value, bool):  # which Python takes for an integer
        fits = bool in allowed
    elif isinstance(value, int | float) and float in allowed:
        fits = math.isfinite(value)
    if not fits:
        kinds = " or ".join(_TYPE_NAMES[kind] for kind in allowed)
        raise InputError(f"{key} must be {kinds}, not {value!r}")


_TYPE_NAMES = {
    int: "an integer",
    float: "a finite number",
    str: "a text",
    bool: "true or false",
    dict: "an object",
    list: "a list",
    NoneType: "null",
}


def _read_labels(labels: dict[Any, Any]) -> dict[int, str]:
    """The label map of a ``config.json``, whose numbers are texts there."""
    try:
        numbered = {int(number): str(name) for number, name in labels.items()}
    except ValueError as error:
        raise InputError(f"id2label must map numbers to names, not {next(iter(labels))!r}") from error
    if not numbered:
        raise InputError("id2label must name at least one label")
    return numbered


def read_config(folder: str | os.PathLike) -> dict[str, Any]:
    """Return the keys of the ``config.json`` in a checkpoint folder.

    Raises:
        InputError: no such folder, no ``config.json`` in it, or it is not a JSON object.
    """
    folder = Path(folder)
    if not folder.exists():
        raise InputError(f"no such folder: {folder} (a Hugging Face checkpoint folder is expected)")
    if not folder.is_dir():
        raise InputError(
            f"{folder} is a file; a Hugging Face checkpoint folder with {CONFIG_NAME} is expected"
        )
    path = folder / CONFIG_NAME
    if not path.is_file():
        raise InputError(f"{folder} has no {CONFIG_NAME}, so it is not a Hugging Face checkpoint folder")
    values = read_json(path)
    if not isinstance(values, dict):
        raise InputError(f"{path} holds a {type(values).__name__}, not an object of configuration keys")
    return values
