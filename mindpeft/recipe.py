"""Recipes: a training run as a YAML file, checked key by key before anything starts.

Sections: ``model``, ``data``, ``peft``, ``train``; beside them ``output_dir``, ``device``, ``device_id`` and
``seed``. Relative paths are relative to the current directory, and ``~`` is the home directory.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from mindpeft.errors import InputError
from mindpeft.files import atomic_write
from mindpeft.recipe_peft import read_methods
from mindpeft.recipe_sections import (
    LANGUAGE_TASKS,
    DataSection,
    GenerationSection,
    ModelSection,
    absolute,
)
from mindpeft.recipe_values import build, checked_values, field_hints

if TYPE_CHECKING:
    from mindpeft.config import PeftConfig
    from mindpeft.train import TrainingArguments

TASK_TYPES = {"token_classification": "TOKEN_CLS", "masked_lm": None}  # all others classify whole texts
TASK_TYPES |= dict.fromkeys(LANGUAGE_TASKS, "CAUSAL_LM")
# Keys of TrainingArguments that a recipe says elsewhere.
_TOP_LEVEL_KEYS = {"output_dir": "output_dir", "device": "device", "device_id": "device_id", "seed": "seed"}
_SAID_ELSEWHERE = {**_TOP_LEVEL_KEYS, "max_length": "data.max_length"}
_OF_ONE_INVOCATION = {"overwrite_output_dir", "resume_from_checkpoint"}


@dataclass
class Recipe:
    """A whole training run.

    Attributes:
        model, data: see the sections.
        peft: ``method``, ``preset`` if the method has some, and the keys of the method's config; a list of
            such sections makes one hybrid adapter.
        train: keys of ``mindpeft.train.TrainingArguments``.
        stages: a list of ``peft``, ``train`` and ``data`` sections, trained one after another: each keeps
            what the ones before it made, frozen, and adds its own part; its ``train`` and ``data`` win over
            the common ones.
        generation: answers to write at every evaluation of a decoder; none if absent.
        output_dir: the run's folder.
        device: auto, Ascend, GPU or CPU.
        device_id: which of several devices.
        seed: fixes everything random.
    """

    model: ModelSection
    data: DataSection
    peft: dict[str, Any] | list[dict[str, Any]] | None = None
    train: dict[str, Any] = field(default_factory=dict)
    stages: list[dict[str, Any]] = field(default_factory=list)
    generation: GenerationSection | None = None
    output_dir: str = "mindpeft-run"
    device: str = "auto"
    device_id: int | None = None
    seed: int = 42

    def __post_init__(self) -> None:
        self.output_dir = absolute(self.output_dir)
        if self.stages:
            self._check_stages()
        else:
            self.peft = {"method": "lora"} if self.peft is None else self.peft
            self.peft_configs()
            self.training_arguments()

    def _check_stages(self) -> None:
        if self.peft is not None:
            raise InputError("peft belongs into each of the stages when there are stages; leave it out here")
        for number, stage in enumerate(self.stages, 1):
            if not isinstance(stage, dict) or "peft" not in stage or stage.keys() - {"peft", "train", "data"}:
                raise InputError(
                    f"stages, number {number}: a stage has the keys peft and, if they differ, train and data"
                )
        self.stage_recipes()

    def peft_configs(self) -> list[PeftConfig]:
        """The adapter's configs, one for each method; their task type follows from the data's task.

        Raises:
            InputError: an unknown method or key, or a bad value.
        """
        task_type = TASK_TYPES.get(self.data.task, "SEQ_CLS")
        return read_methods(self.peft, task_type, f"data.task {self.data.task}")

    def stage_recipes(self) -> list[Recipe]:
        """The recipe of each stage: this one without stages; the last one has this one's output folder."""
        if not self.stages:
            return [self]
        recipes = []
        for number, stage in enumerate(self.stages, 1):
            folder = Path(self.output_dir) if number == len(self.stages) else self.stage_folder(number)
            changes = {"peft": stage["peft"], "train": {**self.train, **stage.get("train", {})}}
            try:
                changes["data"] = self._data_with(stage.get("data", {}))
                recipes.append(dataclasses.replace(self, stages=[], output_dir=str(folder), **changes))
            except InputError as error:
                raise InputError(f"stages, number {number}: {error}") from error
        return recipes

    def _data_with(self, changes: dict[str, Any]) -> DataSection:
        hints = field_hints(DataSection)
        if not isinstance(changes, dict):
            raise InputError(f"data must be a mapping, not {changes!r}")
        return build(
            "data", DataSection, dataclasses.asdict(self.data) | checked_values("data", changes, hints)
        )

    def data_of(self, folder: Path) -> DataSection:
        """The data of the stage with this run folder; of the last one if it is none's."""
        recipes = self.stage_recipes()
        return next((stage for stage in recipes if Path(stage.output_dir) == folder), recipes[-1]).data

    def stage_folder(self, number: int) -> Path:
        """The run folder of a stage (from 1) that is not the last."""
        return Path(self.output_dir) / f"stage-{number}"

    def training_arguments(self, **changes: Any) -> TrainingArguments:
        """The trainer's arguments; ``changes`` win over the recipe.

        Raises:
            InputError: an unknown key, or a bad value.
        """
        from mindpeft.train import TrainingArguments

        for key, place in _SAID_ELSEWHERE.items():
            if key in self.train:
                raise InputError(f"train.{key} is not a key of train: write {place}")
        allowed = field_hints(TrainingArguments, without=_SAID_ELSEWHERE)
        values = {key: _unquoted_no(key, value) for key, value in self.train.items()}
        values = {**checked_values("train", values, allowed), **changes}
        values |= {key: getattr(self, key) for key in _TOP_LEVEL_KEYS}
        return build("train", TrainingArguments, values | {"max_length": self.data.max_length})

    def to_dict(self) -> dict[str, Any]:
        """The recipe with all defaults of the sections and of training filled in, nulls left out."""
        training = self.training_arguments().to_dict()
        hidden = _SAID_ELSEWHERE.keys() | _OF_ONE_INVOCATION
        values = dataclasses.asdict(self)
        values["train"] = {key: value for key, value in training.items() if key not in hidden}
        if not self.stages:
            del values["stages"]
        return _without_null(values)

    def save(self, path: str | os.PathLike) -> None:
        """Write the recipe as YAML; ``load_recipe`` reads it back."""
        with atomic_write(path, "w") as file:
            yaml.safe_dump(self.to_dict(), file, sort_keys=False, allow_unicode=True)


def load_recipe(path: str | os.PathLike, overrides: Sequence[str] = ()) -> Recipe:
    """Read and check a recipe.

    Args:
        path: a YAML file.
        overrides: ``key=value`` with a dotted key and a YAML value, such as ``train.learning_rate=1e-3``;
            they win over the file.

    Raises:
        InputError: no such file, not YAML, an unknown key, or a bad value; the message has the dotted path.
    """
    values = _read_yaml(Path(path))
    for override in overrides:
        _override(values, override)
    try:
        return recipe_from_dict(values)
    except InputError as error:
        raise InputError(f"{path}: {error}") from error


def recipe_from_dict(values: Mapping[str, Any]) -> Recipe:
    """Check the keys and values of a recipe and make it; see ``load_recipe``."""
    hints = field_hints(Recipe)
    sections = {"model": ModelSection, "data": DataSection, "generation": GenerationSection}
    plain = {key: dict if key in sections or key == "train" else hint for key, hint in hints.items()}
    checked = checked_values("", values, plain)
    for name, section in sections.items():
        if name not in checked and name == "generation":
            continue
        if name not in checked:
            raise InputError(f"the section {name} is missing")
        checked[name] = build(name, section, checked_values(name, checked[name], field_hints(section)))
    return Recipe(**checked)


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        values = yaml.load(path.read_text(encoding="utf-8-sig"), _UniqueKeyLoader)  # a SafeLoader
    except FileNotFoundError as error:
        raise InputError(f"no such recipe: {path}") from error
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        where = "" if mark is None else f" at line {mark.line + 1}, column {mark.column + 1}"
        raise InputError(f"{path} is not valid YAML: {error.problem or error.context}{where}") from error
    except OSError as error:
        raise InputError(f"can't read {path}: {error.strerror}") from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        reason = str(error).partition("\n")[0]
        raise InputError(f"{path} is not valid YAML: {reason}") from error
    if not isinstance(values, dict):
        raise InputError(f"{path} must hold the sections of a recipe (model, data, peft, train)")
    return values


class _UniqueKeyLoader(yaml.SafeLoader):
    """PyYAML takes the last of two equal keys in silence; a recipe with both is a mistake."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        seen = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode):
                if key.value in seen:
                    problem = f"the key {key.value!r} occurs twice"
                    raise yaml.constructor.ConstructorError(None, None, problem, key.start_mark)
                seen.add(key.value)
        return super().construct_mapping(node, deep)


def _override(values: dict[str, Any], text: str) -> None:
    """Set one ``dotted.key=value``."""
    key, equals, value = text.partition("=")
    parts = key.strip().split(".")
    if not equals or "" in parts:
        raise InputError(f"{text!r} is no override: write key=value, such as train.learning_rate=1e-3")
    place = values
    for part in parts[:-1]:
        if place.get(part) is None:
            place[part] = {}
        place = place[part]
        if not isinstance(place, dict):
            raise InputError(f"can't set {key}: {part} is not a section")
    try:
        place[parts[-1]] = yaml.safe_load(value)
    except yaml.YAMLError as error:
        raise InputError(f"the value of {key}={value} is not valid YAML") from error


def _unquoted_no(key: str, value: Any) -> Any:
    """YAML reads ``eval_strategy: no`` as false."""
    return "no" if key in ("eval_strategy", "save_strategy") and value is False else value


def _without_null(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_null(item) for key, item in value.items() if item is not None}
    return value
