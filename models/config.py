"""What every architecture's configuration shares: reading and writing ``config.json``."""

from __future__ import annotations

import os
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, ClassVar

from mindpeft.errors import InputError
from mindpeft.files import read_json, write_json

CONFIG_NAME = "config.json"


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

    @property
    def num_labels(self) -> int:
        return len(self.id2label)

    @num_labels.setter
    def num_labels(self, count: int) -> None:
        if count < 1:
            raise InputError(f"num_labels must be at least 1, not {count}")
        if count != len(self.id2label):
            self.id2label = {number: f"LABEL_{number}" for number in range(count)}

    @property
    def label2id(self) -> dict[str, int]:
        return {name: number for number, name in self.id2label.items()}

    @classmethod
    def from_dict(cls, values: dict[str, Any], **overrides: Any) -> PretrainedConfig:
        """Build a configuration from the keys of a ``config.json``; ``overrides`` (also num_labels) win."""
        values = {**values, **overrides}
        num_labels = values.pop("num_labels", None)
        labels = values.pop("id2label", None)
        values.pop("label2id", None)
        known = {entry.name for entry in fields(cls)} - {"extra"}
        config = cls(
            **{key: value for key, value in values.items() if key in known},
            extra={key: value for key, value in values.items() if key not in known | {"model_type"}},
        )
        if labels is not None:
            config.id2label = {int(number): str(name) for number, name in dict(labels).items()}
        if num_labels is not None:
            config.num_labels = num_labels
        return config

    def to_dict(self) -> dict[str, Any]:
        """Return the keys of ``config.json``."""
        own = {entry.name: getattr(self, entry.name) for entry in fields(self)}
        own.pop("extra")
        own.pop("name_or_path")
        own["id2label"] = {str(number): name for number, name in self.id2label.items()}
        return {**self.extra, **own, "label2id": self.label2id, "model_type": self.model_type}

    def save_pretrained(self, folder: str | os.PathLike) -> None:
        """Write ``config.json`` into ``folder``."""
        write_json(Path(folder) / CONFIG_NAME, self.to_dict())


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
