"""PeftConfig: what every method's configuration shares, and its JSON file in Hugging Face PEFT's format."""

from __future__ import annotations

import logging
import os
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

from mindpeft.errors import InputError, did_you_mean
from mindpeft.files import read_json, write_json

if TYPE_CHECKING:
    import numpy as np

    from mindpeft.tuners.base import Shapes, Slot, Tensors
    from mindpeft.tuners.hooks import TrainingHook
    from mindpeft.tuners.plan import BaseModel

CONFIG_NAME = "adapter_config.json"
FORMAT_VERSION = "0.21.2"  # the PEFT release whose keys are written
_RUNTIME_KEYS = {"runtime_config"}  # never part of the format; PEFT ignores it too

# Types of keys, as they are annotated -> what their values must be; numbers, lists and choices are checked by
# the methods.
_KINDS: dict[str, tuple[tuple[type, ...], str]] = {
    "bool": ((bool,), "true or false"),
    "bool | str": ((bool, str), "true, false or text"),
    "str | None": ((str, os.PathLike), "text"),
    "dict": ((Mapping,), "an object of keys and values"),
    "dict | None": ((Mapping,), "an object of keys and values"),
}

logger = logging.getLogger(__name__)


class PeftType(str, Enum):
    """The names of the methods in ``adapter_config.json``."""

    LORA = "LORA"
    ADALORA = "ADALORA"
    ADAPTER_FUSION = "ADAPTER_FUSION"
    ADAPTION_PROMPT = "ADAPTION_PROMPT"
    BEFT = "BEFT"
    BITFIT = "BITFIT"
    BOFT = "BOFT"
    BOTTLENECK = "BOTTLENECK"
    C3A = "C3A"
    DELORA = "DELORA"
    DIFF_PRUNING = "DIFF_PRUNING"
    FOURIERFT = "FOURIERFT"
    FREEZE = "FREEZE"
    FULL = "FULL"
    GRALORA = "GRALORA"
    GATED_LORA = "GATED_LORA"
    HRA = "HRA"
    HUB_PREFIX = "HUB_PREFIX"
    IA3 = "IA3"
    LN_TUNING = "LN_TUNING"
    LOHA = "LOHA"
    LOKR = "LOKR"
    MISS = "MISS"
    MULTITASK_PROMPT_TUNING = "MULTITASK_PROMPT_TUNING"
    OFT = "OFT"
    PREFIX_TUNING = "PREFIX_TUNING"
    PROMPT_TUNING = "PROMPT_TUNING"
    P_TUNING = "P_TUNING"
    RANDLORA = "RANDLORA"
    ROAD = "ROAD"
    SHIRA = "SHIRA"
    TRAINABLE_TOKENS = "TRAINABLE_TOKENS"
    VBLORA = "VBLORA"
    VERA = "VERA"
    WAVEFT = "WAVEFT"
    XLORA = "XLORA"  # known, to say that it is not supported


class TaskType(str, Enum):
    """What the model is trained for; it decides which heads an adapter trains and saves."""

    SEQ_CLS = "SEQ_CLS"
    SEQ_2_SEQ_LM = "SEQ_2_SEQ_LM"
    CAUSAL_LM = "CAUSAL_LM"
    TOKEN_CLS = "TOKEN_CLS"
    QUESTION_ANS = "QUESTION_ANS"
    FEATURE_EXTRACTION = "FEATURE_EXTRACTION"


# Names that ``peft.preset`` of a recipe can have without a method, and the parts of those hybrids.
HYBRID_PRESETS: Mapping[str, list[dict[str, Any]]] = {
    # He et al. 2021, "Towards a Unified View of Parameter-Efficient Transfer Learning": mix and match.
    "mam": [
        {
            "method": "hub_prefix",
            "num_virtual_tokens": 30,
            "prefix_projection": True,
            "encoder_hidden_size": 800,
        },
        {"method": "bottleneck", "preset": "par_bn"},
    ],
    # Mao et al. 2022.
    "unipelt": [
        {
            "method": "hub_prefix",
            "num_virtual_tokens": 10,
            "prefix_projection": True,
            "encoder_hidden_size": 512,
            "use_gating": True,
        },
        {"method": "bottleneck", "preset": "seq_bn", "use_gating": True},
        {"method": "gated_lora", "r": 8},
    ],
}

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
    IN_PEFT: ClassVar[bool] = True  # whether Hugging Face PEFT has the method, and so opens its files
    # Arguments for a usable config, where the defaults are none: ``mindpeft methods`` counts with them.
    EXAMPLE: ClassVar[Mapping[str, Any]] = {}
    # How the file's tensor names begin: those of cells (and of base parameters), and those that are shared.
    CELL_PREFIX: ClassVar[str] = "base_model.model."
    SHARED_PREFIX: ClassVar[str] = "base_model.model."
    FORMERLY: ClassVar[tuple[str, ...]] = ()  # what earlier releases of PEFT called the method
    # Last parts of the names of the file's tensors that may hold whole numbers.
    WHOLE_NUMBERS: ClassVar[tuple[str, ...]] = ("num_batches_tracked",)
    # Names that ``peft.preset`` of a recipe can have, and the config classes whose defaults they stand for.
    PRESETS: ClassVar[Mapping[str, type[PeftConfig]]] = {}

    def __post_init__(self) -> None:
        if self.METHOD is None:
            raise InputError(
                "PeftConfig is the base of the methods' configs; create one of those (LoraConfig)"
            )
        self.peft_type = self.METHOD
        self._check_types()
        if self.task_type is not None:
            self.task_type = _member(TaskType, self.task_type, "task_type")
        if self.peft_version is None:
            self.peft_version = FORMAT_VERSION

    def _check_types(self) -> None:
        """Refuse values of another type where text, an object, or true or false is wanted."""
        for entry in fields(self):
            value = getattr(self, entry.name)
            wanted = _KINDS.get(str(entry.type).partition("[")[0])
            if wanted and value is not None and not isinstance(value, wanted[0]):
                raise InputError(f"{entry.name} must be {wanted[1]}, not {value!r}")

    # What a method's config says about a model; see ``mindpeft.tuners`` ------------------------------------

    def resolve(self, base: BaseModel) -> None:
        """Fill in what the model decides (default targets, "all-linear", a weight's layout).

        Raises:
            InputError: the model does not suit the method.
        """

    def check_file(self) -> None:
        """Refuse, or warn of, a file whose adapter can't be rebuilt exactly from what it holds.

        Raises:
            InputError: it can't be rebuilt at all.
        """

    def as_written(self, values: Mapping[str, Any]) -> PeftConfig:
        """The config that means now what a file's keys meant to the PEFT that wrote them.

        What can't be had exactly is warned of.

        Args:
            values: the file's keys and values; "peft_version" is there since PEFT 0.18.
        """
        return self

    def from_file(self, tensors: Tensors) -> Tensors:
        """The adapter's tensors, by the names of ``in_file`` without their prefixes, from a file's.

        For methods whose files hold something twice, or in another form.

        Raises:
            InputError: the file contradicts itself.
        """
        return tensors

    def in_file(self, tensors: Tensors) -> Tensors:
        """What a file holds for these tensors, names as in the file: the reverse of ``from_file``."""
        return tensors

    def slot_classes(self, base: BaseModel) -> dict[str, type[Slot]]:
        """The class of the slot at each place that the method changes, by path; "" is the model itself."""
        return {}

    def selected(self, base: BaseModel, wrapped: Collection[str]) -> list[str]:
        """The base model's own parameters that are trained where they are (biases), by name.

        Args:
            wrapped: the paths that ``slot_classes`` gave.
        """
        return []

    def frozen_parts(self, earlier: Sequence[PeftConfig]) -> list[int]:
        """Which of the parts before it in a hybrid stay frozen, by their numbers.

        Raises:
            InputError: the method can't follow these parts.
        """
        return []

    def roomy(self, slot_rank: int) -> PeftConfig:
        """This config with another rank, for slots that shall hold adapters of up to that rank.

        Raises:
            InputError: the method has no rank.
        """
        raise InputError(f"slot_rank is for methods with a rank, which {self.peft_type.value} has not")

    def training_hook(self, slots: Mapping[str, Slot], shapes: Mapping[str, Shapes]) -> TrainingHook | None:
        """What the method adds to every training step of an adapter, if anything.

        Args:
            slots: the adapter's slots by path.
            shapes: the true shapes of its tensors there.
        """
        return None

    def for_file(self, tensors: Mapping[str, Mapping[str, np.ndarray]]) -> PeftConfig:
        """The config that is written beside these tensors (path -> name -> value), if not this one."""
        return self

    def converted(
        self, tensors: dict[str, Tensors], initial: dict[str, Tensors]
    ) -> tuple[PeftConfig, dict[str, Tensors]]:
        """The config and tensors of an equal adapter that takes nothing out of the base model's weights.

        Args:
            tensors: path -> the adapter's tensors.
            initial: path -> those that were taken out of the weights there.

        Raises:
            InputError: there is no such adapter.
        """
        raise InputError(f"{self.peft_type.value} adapters can't be converted")

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
            return cls.from_dict(values).as_written(values)
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

    former = [config_class for config_class in _METHODS.values() if peft_type in config_class.FORMERLY]
    if former:
        return former[0]
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
