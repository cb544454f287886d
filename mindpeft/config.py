"""PeftConfig: what every method's configuration shares, and its JSON file in Hugging Face PEFT's format."""

from __future__ import annotations

import logging
import os
from dataclasses import asdict, dataclass, fields
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

from mindpeft.errors import InputError, did_you_mean
from mindpeft.files import read_json, write_json

if TYPE_CHECKING:
    from mindspore import nn

CONFIG_NAME = "adapter_config.json"
FORMAT_VERSION = "0.21.2"  # the PEFT release whose keys are written
_RUNTIME_KEYS = {"runtime_config"}  # never part of the format; PEFT ignores it too

logger = logging.getLogger(__name__)


class PeftType(str, Enum):
    """The names of the methods in ``adapter_config.json``."""

    LORA = "LORA"
    ADALORA = "ADALORA"
    ADAPTION_PROMPT = "ADAPTION_PROMPT"
    BEFT = "BEFT"
    BITFIT = "BITFIT"
    BOFT = "BOFT"
    IA3 = "IA3"
    LN_TUNING = "LN_TUNING"
    LOHA = "LOHA"
    LOKR = "LOKR"
    MULTITASK_PROMPT_TUNING = "MULTITASK_PROMPT_TUNING"
    OFT = "OFT"
    PREFIX_TUNING = "PREFIX_TUNING"
    PROMPT_TUNING = "PROMPT_TUNING"
    P_TUNING = "P_TUNING"
    TRAINABLE_TOKENS = "TRAINABLE_TOKENS"
    VERA = "VERA"


class TaskType(str, Enum):
    """What the model is trained for; it decides which heads an adapter trains and saves."""

    SEQ_CLS = "SEQ_CLS"
    SEQ_2_SEQ_LM = "SEQ_2_SEQ_LM"
    CAUSAL_LM = "CAUSAL_LM"
    TOKEN_CLS = "TOKEN_CLS"
    QUESTION_ANS = "QUESTION_ANS"
    FEATURE_EXTRACTION = "FEATURE_EXTRACTION"


# The heads that an adapter for a task trains and saves besides its own tensors.
TASK_HEADS = {
    TaskType.SEQ_CLS: ("classifier", "score"),
    TaskType.TOKEN_CLS: ("classifier", "score"),
    TaskType.QUESTION_ANS: ("qa_outputs",),
}


@dataclass
class PeftConfig:
    """The keys that every method has; a method's own config derives from it.

    Attributes:
        peft_type: the method; set by the subclass.
        task_type: a ``TaskType`` or ``None``.
        auto_mapping: the base model's class, written by ``save_pretrained`` when ``task_type`` is ``None``.
        peft_version: the version of the format.
        base_model_name_or_path: where the base model came from.
        revision: the base model's revision.
        inference_mode: whether the adapter is frozen; always true in a file.
    """

    task_type: TaskType | str | None = None
    peft_type: PeftType | str | None = None
    auto_mapping: dict[str, str] | None = None
    peft_version: str | None = None
    base_model_name_or_path: str | None = None
    revision: str | None = None
    inference_mode: bool = False

    METHOD: ClassVar[PeftType | None] = None

    def __post_init__(self) -> None:
        if self.METHOD is None:
            raise InputError(
                "PeftConfig is the base of the methods' configs; create one of those (LoraConfig)"
            )
        self.peft_type = self.METHOD
        if self.task_type is not None:
            self.task_type = _member(TaskType, self.task_type, "task_type")
        if self.peft_version is None:
            self.peft_version = FORMAT_VERSION

    def describe_cells(self, cells: list[nn.Cell]) -> None:
        """Take over what the targeted cells themselves decide (their weights' layout, say)."""

    def to_dict(self) -> dict[str, Any]:
        """The keys and values as JSON knows them: enums as text, sets as sorted lists."""
        return {key: _plain(value) for key, value in asdict(self).items()}

    def save_pretrained(self, save_directory: str | os.PathLike) -> None:
        """Write ``adapter_config.json`` into a folder, which is made if absent.

        Raises:
            InputError: the folder can't be written.
        """
        write_json(Path(save_directory) / CONFIG_NAME, {**self.to_dict(), "inference_mode": True})

    @classmethod
    def from_pretrained(cls, folder: str | os.PathLike) -> PeftConfig:
        """Read ``adapter_config.json`` of a folder into the config class of its ``peft_type``.

        Keys that this version doesn't know are dropped with a warning that names them.

        Raises:
            InputError: no such file, not a JSON object, an unknown or unsupported method, or a bad value.
        """
        path = Path(folder) / CONFIG_NAME
        if not path.parent.is_dir():
            raise InputError(f"no such adapter folder: {path.parent}")
        values = read_json(path)
        if not isinstance(values, dict):
            raise InputError(f"{path} must hold a JSON object, not {type(values).__name__}")
        try:
            return cls.from_dict(values)
        except InputError as error:
            raise InputError(f"{path}: {error}") from error

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> PeftConfig:
        """Make the config of ``values["peft_type"]``; see ``from_pretrained``."""
        if "peft_type" not in values:
            raise InputError("the key 'peft_type' is missing; it names the method, such as \"LORA\"")
        config_class = config_class_of(values["peft_type"])
        if not issubclass(config_class, cls):
            raise InputError(f"peft_type {values['peft_type']!r} is not read by {cls.__name__}")
        known = {field.name for field in fields(config_class)}
        unknown = sorted(values.keys() - known - _RUNTIME_KEYS)
        if unknown:
            logger.warning("%s: unknown keys ignored: %s", config_class.__name__, ", ".join(unknown))
        chosen = {key: value for key, value in values.items() if key in known and key != "peft_type"}
        return config_class(**chosen)


ConfigClass = TypeVar("ConfigClass", bound=type[PeftConfig])
_METHODS: dict[PeftType, type[PeftConfig]] = {}


def register_method(config_class: ConfigClass) -> ConfigClass:
    """Class decorator: make a method's config known by its ``METHOD``."""
    _METHODS[config_class.METHOD] = config_class
    return config_class


def supported_methods() -> dict[PeftType, type[PeftConfig]]:
    """The methods that there are, each with its config class."""
    import mindpeft.tuners  # noqa: F401  (fills the registry)

    return dict(_METHODS)


def config_class_of(peft_type: str) -> type[PeftConfig]:
    """Return the config class of a method.

    Raises:
        InputError: there is no such method, or it is not supported yet.
    """
    import mindpeft.tuners  # noqa: F401  (fills the registry)

    method = _member(PeftType, peft_type, "peft_type")
    if method not in _METHODS:
        supported = ", ".join(sorted(name.value for name in _METHODS))
        raise InputError(f"the method {method.value} is not supported; supported: {supported}")
    return _METHODS[method]


def add_task_heads(task_type: TaskType | None, modules_to_save: list[str] | None) -> list[str] | None:
    """``modules_to_save`` with the heads that the task trains, each once, order kept."""
    heads = TASK_HEADS.get(task_type, ())
    merged = list(dict.fromkeys([*(modules_to_save or []), *heads]))
    return merged or modules_to_save


def _member(enum: type[Enum], value: Any, key: str) -> Any:
    """The enum's member of that value, or an error with the nearest one."""
    try:
        return enum(value)
    except ValueError as error:
        names = [member.value for member in enum]
        raise InputError(
            f"unknown {key} {value!r}{did_you_mean(value, names)}; allowed: {', '.join(names)}"
        ) from error


def _plain(value: Any) -> Any:
    """A value in the types of JSON."""
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, set):
        return sorted(value)
    return value
