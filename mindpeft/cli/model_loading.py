"""From a checkpoint folder and a task to the model with the head that the task needs."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from mindpeft.config import PeftConfig, TaskType
from mindpeft.data.label_map import LabelMap
from mindpeft.errors import InputError

if TYPE_CHECKING:
    from mindpeft.models.pretrained import PreTrainedModel

_HEADS = {
    "single_label_classification": "AutoModelForSequenceClassification",
    "multi_label_classification": "AutoModelForSequenceClassification",
    "regression": "AutoModelForSequenceClassification",
    "token_classification": "AutoModelForTokenClassification",
    "masked_lm": "AutoModelForMaskedLM",
    "causal_lm": "AutoModelForCausalLM",
    "instruction": "AutoModelForCausalLM",
}
_HEADS_OF_TASK_TYPE = {
    TaskType.SEQ_CLS: "AutoModelForSequenceClassification",
    TaskType.TOKEN_CLS: "AutoModelForTokenClassification",
    TaskType.QUESTION_ANS: "AutoModelForQuestionAnswering",
    TaskType.FEATURE_EXTRACTION: "AutoModel",
    TaskType.CAUSAL_LM: "AutoModelForCausalLM",
}


def head_of_task(task: str) -> str:
    """The ``Auto`` class for a recipe's ``data.task``."""
    return _HEADS[task]


def head_of_adapter(config: PeftConfig, base: Path) -> str:
    """The ``Auto`` class of the model that an adapter was made for: by its task type, or its base's class."""
    if config.task_type in _HEADS_OF_TASK_TYPE:
        return _HEADS_OF_TASK_TYPE[config.task_type]
    class_name = (config.auto_mapping or {}).get("base_model_class")
    return head_of_class(class_name, base) or "AutoModel"


def head_of_class(class_name: str | None, folder: Path) -> str | None:
    """The ``Auto`` class that stands for a class such as ``BertForMaskedLM``; None if there is none."""
    from mindpeft.models.auto import architecture
    from mindpeft.models.config import CONFIG_NAME, read_config

    heads = architecture(read_config(folder).get("model_type"), str(folder / CONFIG_NAME)).HEADS
    return next((auto for auto, model in heads.items() if model.__name__ == class_name), None)


def load_model(
    folder: Path,
    head: str,
    *,
    label_map: LabelMap | None = None,
    task: str | None = None,
    dtype: str = "float32",
) -> PreTrainedModel:
    """Load a checkpoint under a head, with the labels' names and the kind of loss in its configuration.

    Args:
        folder: a Hugging Face checkpoint folder.
        head: the name of an ``Auto`` class of ``mindpeft.models``.
        label_map: names of the classes; None leaves the configuration's own.
        task: a recipe's ``data.task``.
        dtype: of the weights.

    Raises:
        InputError: the folder can't be used, or the architecture has no such head.
    """
    from mindpeft import models

    overrides: dict[str, Any] = {}
    if task == "regression":
        overrides = {"num_labels": 1, "id2label": {0: "value"}}
    elif label_map is not None:
        overrides = {"num_labels": len(label_map), "id2label": label_map.id2label}
    if task is not None and head == "AutoModelForSequenceClassification":
        overrides["problem_type"] = task
    return getattr(models, head).from_pretrained(folder, dtype=dtype, **overrides)


def check_max_length(max_length: int | None, config: Any, tokenizer: Any) -> int | None:
    """The most tokens of a row: what is asked for, else what tokenizer and model allow.

    Raises:
        InputError: more is asked for than the model has positions.
    """
    positions = getattr(config, "max_position_embeddings", None)
    if max_length is not None and positions is not None and max_length > positions:
        raise InputError(f"data.max_length is {max_length}, but the model has {positions} positions")
    limits = [limit for limit in (tokenizer.model_max_length, positions) if limit is not None]
    return max_length or min(limits, default=None)


def padding_id(model: Any, tokenizer: Any) -> int:
    """The token that rows are filled up with; a decoder that classifies texts is told of it."""
    found = next((i for i in (tokenizer.pad_token_id, tokenizer.eos_token_id) if i is not None), 0)
    config = getattr(model, "config", None)
    if config is not None and getattr(config, "pad_token_id", found) is None:
        config.pad_token_id = found
    return found if config is None else getattr(config, "pad_token_id", found)
