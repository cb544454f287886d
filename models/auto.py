"""Finding the architecture of a checkpoint folder by the ``model_type`` in its config.json."""

from __future__ import annotations

import importlib
import os
from types import ModuleType
from typing import Any

from mindpeft.errors import InputError, did_you_mean
from mindpeft.models.config import CONFIG_NAME, PretrainedConfig, read_config
from mindpeft.models.pretrained import PreTrainedModel

# model_type -> the file under models/ that defines it
MODEL_FILES = {
    "bert": "bert",
    "bloom": "bloom",
    "chatglm": "chatglm",
    "distilbert": "distilbert",
    "gemma": "gemma",
    "gemma2": "gemma2",
    "gemma3_text": "gemma3",
    "glm": "glm",
    "glm4": "glm4",
    "gpt2": "gpt2",
    "gpt_neo": "gpt_neo",
    "gpt_neox": "gpt_neox",
    "internlm2": "internlm2",
    "llama": "llama",
    "mistral": "mistral",
    "opt": "opt",
    "phi3": "phi3",
    "qwen2": "qwen2",
    "qwen3": "qwen3",
    "roberta": "roberta",
    "xlm-roberta": "xlm_roberta",
}


def architecture(model_type: Any, where: str) -> ModuleType:
    """Return the module that defines ``model_type``.

    Raises:
        InputError: it is not supported; the message names those that are. ``where`` says who asks.
    """
    if model_type is None:
        raise InputError(f"{where} has no model_type; known: {', '.join(sorted(MODEL_FILES))}")
    if not isinstance(model_type, str) or model_type not in MODEL_FILES:
        raise InputError(
            f"{where}: model_type {model_type!r} is not supported; known: {', '.join(sorted(MODEL_FILES))}"
            + did_you_mean(str(model_type), MODEL_FILES)
        )
    return importlib.import_module(f"mindpeft.models.{MODEL_FILES[model_type]}")


class AutoConfig:
    """The configuration of a checkpoint folder."""

    @staticmethod
    def from_pretrained(folder: str | os.PathLike, **overrides: Any) -> PretrainedConfig:
        """Read config.json; ``overrides`` are configuration keys such as ``num_labels``."""
        values = read_config(folder)
        module = architecture(values.get("model_type"), f"{folder}/{CONFIG_NAME}")
        config_class = module.HEADS["AutoModel"].config_class
        return config_class.from_dict(values, name_or_path=str(folder), **overrides)


class _Auto:
    """Builds the class that the folder's model_type names for one head."""

    @classmethod
    def model_class(cls, folder: str | os.PathLike) -> type[PreTrainedModel]:
        """Return the class for this head and the folder's architecture."""
        values = read_config(folder)
        heads = architecture(values.get("model_type"), f"{folder}/{CONFIG_NAME}").HEADS
        if cls.__name__ not in heads:
            raise InputError(
                f"{folder}: {values['model_type']!r} has no {cls.__name__}; it has {', '.join(heads)}"
            )
        return heads[cls.__name__]

    @classmethod
    def from_pretrained(cls, folder: str | os.PathLike, **arguments: Any) -> PreTrainedModel:
        """Load a checkpoint folder; the arguments are those of ``PreTrainedModel.from_pretrained``."""
        return cls.model_class(folder).from_pretrained(folder, **arguments)

    @classmethod
    def from_config(cls, config: PretrainedConfig) -> PreTrainedModel:
        """Build a model with fresh weights."""
        heads = architecture(config.model_type, type(config).__name__).HEADS
        return heads[cls.__name__].from_config(config)


class AutoModel(_Auto):
    """The backbone without a head: features."""


class AutoModelForSequenceClassification(_Auto):
    """A class, several labels, or numbers for a whole text."""


class AutoModelForTokenClassification(_Auto):
    """A class for each token."""


class AutoModelForQuestionAnswering(_Auto):
    """Start and end of an answer."""


class AutoModelForCausalLM(_Auto):
    """The next token."""


class AutoModelForMaskedLM(_Auto):
    """Masked tokens."""
