"""What a run folder holds, and how eval, predict and merge open it.

The adapter (``adapter_config.json``, ``adapter_model.safetensors``) stands at the top, so that Hugging Face
PEFT opens the folder itself, with the tokenizer's files beside it; ``labels.json`` is the label map,
``recipe.yaml`` the recipe with all values used, ``metrics.json`` what was measured, ``train_log.jsonl`` and
``curves.png`` the course of training, ``checkpoint-N`` what resuming needs (it opens like a run).
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from mindpeft.adapter_files import WEIGHT_NAMES, is_adapter, part_folders
from mindpeft.cli.model_loading import head_of_adapter, head_of_class, load_model
from mindpeft.config import CONFIG_NAME, PeftConfig, TaskType
from mindpeft.console import logger
from mindpeft.convert.checkpoint import open_checkpoint
from mindpeft.data.label_map import LabelMap
from mindpeft.data.tokenization import AutoTokenizer, Tokenizer
from mindpeft.errors import InputError
from mindpeft.peft_model import PeftModel
from mindpeft.recipe import Recipe, load_recipe
from mindpeft.recipe_sections import LANGUAGE_TASKS, DataSection, absolute
from mindpeft.train.checkpoints import list_checkpoints

if TYPE_CHECKING:
    from mindspore import nn

LABELS_FILE = "labels.json"
RECIPE_FILE = "recipe.yaml"
METRICS_FILE = "metrics.json"
_MODEL_CONFIG = "config.json"
_TOKENIZER_FILES = ("tokenizer.json", "vocab.txt")
_HEAD_WEIGHT = re.compile(r"(^|\.)(classifier|score)\.(\w+\.)*weight$")


@dataclass(frozen=True)
class Run:
    """A trained model ready to be asked.

    Attributes:
        folder: where it was opened.
        base: the folder of the base model (the same for a whole checkpoint).
        model: in inference mode; a ``PeftModel`` unless the folder is a whole checkpoint.
        task: a recipe's ``data.task``; None where nobody knows.
        label_map: names of the classes; None without classes.
        data: how training read its data; None without a recipe.
    """

    folder: Path
    base: Path
    model: nn.Cell
    task: str | None
    label_map: LabelMap | None
    data: DataSection | None

    def tokenizer(self) -> Tokenizer:
        """The run's own tokenizer, else its base's.

        Raises:
            InputError: neither folder holds one.
        """
        own = next(filter(None, (_beside(self.folder, name) for name in _TOKENIZER_FILES)), None)
        return AutoTokenizer.from_pretrained(self.base if own is None else own.parent)

    def require_labels(self, command: str) -> None:
        """Raise InputError unless the model answers with labels or numbers."""
        if self.task is None or self.task in ("masked_lm", *LANGUAGE_TASKS):
            kind = self.task or "neither a classifier nor a regression"
            other = "; mindpeft generate writes text" if self.task in LANGUAGE_TASKS else ""
            raise InputError(f"{command} answers with labels or numbers, but {self.folder} is {kind}{other}")


def open_run(folder: str | Path, base: str | Path | None = None, dtype: str = "float32") -> Run:
    """Open a run folder, a checkpoint of a run, any adapter folder of PEFT's, or a whole checkpoint.

    Args:
        folder: what to open.
        base: the base model's folder, where it is not where the adapter says.
        dtype: of the base model's weights.

    Raises:
        InputError: nothing of the kind is there, the base model is missing, or the two don't fit.
    """
    folder = Path(absolute(str(folder)))
    if is_adapter(folder):
        return _open_adapter(folder, base, dtype)
    if (folder / _MODEL_CONFIG).is_file() and base is None:
        return _open_whole(folder, dtype)
    raise InputError(_what_is_missing(folder))


def _what_is_missing(folder: Path) -> str:
    if not folder.is_dir():
        return f"no such folder: {folder}"
    checkpoints = list_checkpoints(folder)
    if checkpoints:
        return f"{folder} is a run that did not end; resume it, or use its last checkpoint {checkpoints[-1]}"
    return f"{folder} holds no {CONFIG_NAME}, so it is no adapter and no run"


def _open_adapter(folder: Path, base: str | Path | None, dtype: str) -> Run:
    config = PeftConfig.from_pretrained(part_folders(folder)[0])
    recipe = _recipe_of(folder)
    base = find_base(folder, config, recipe, base)
    head = head_of_adapter(config, base)
    label_map = _labels_of(folder)
    data = recipe.data_of(folder) if recipe else None
    task = data.task if data else None
    if label_map is None and task != "regression":
        label_map = _numbered_labels(folder)
    with _without_reports():
        model = load_model(base, head, label_map=label_map, task=task, dtype=dtype)
    label_map = label_map or _labels_in_config(config.task_type, task, model)
    task = task or _guess_task(config.task_type, model)
    peft_model = PeftModel.from_pretrained(model, folder)
    return Run(folder, base, peft_model, task, label_map, data)


@contextmanager
def _without_reports() -> Iterator[None]:
    """The base's load report would call the head fresh that the adapter is about to fill."""
    level = logger.level
    logger.setLevel(logging.WARNING)
    try:
        yield
    finally:
        logger.setLevel(level)


def _open_whole(folder: Path, dtype: str) -> Run:
    """A merged model, say: its configuration has the label names."""
    from mindpeft.models.config import read_config

    classes = read_config(folder).get("architectures") or [None]
    head = head_of_class(classes[0], folder) or "AutoModel"
    task_type = {
        "AutoModelForSequenceClassification": TaskType.SEQ_CLS,
        "AutoModelForTokenClassification": TaskType.TOKEN_CLS,
    }.get(head)
    model = load_model(folder, head, dtype=dtype)
    languages = {"AutoModelForMaskedLM": "masked_lm", "AutoModelForCausalLM": "causal_lm"}
    task = languages.get(head) or _guess_task(task_type, model)
    return Run(folder, folder, model, task, _labels_in_config(task_type, task, model), None)


def find_base(
    folder: Path, config: PeftConfig, recipe: Recipe | None = None, base: str | Path | None = None
) -> Path:
    """The base model's folder: as given, as the adapter says, or as the run's recipe says.

    Raises:
        InputError: it is nowhere.
    """
    if base is not None:
        return Path(absolute(str(base)))
    named = config.base_model_name_or_path
    if named and Path(named).is_dir():
        return Path(named)
    if recipe is not None and recipe.model.path.startswith("package:"):
        return recipe.model.folder
    if not named:
        raise InputError(f"{folder} does not say what its base model is: give the folder with --base")
    raise InputError(
        f"{folder} was trained on the base model {named!r}, which is no folder here: give it with --base"
    )


def _recipe_of(folder: Path) -> Recipe | None:
    path = _beside(folder, RECIPE_FILE)
    return None if path is None else load_recipe(path)


def _labels_of(folder: Path) -> LabelMap | None:
    path = _beside(folder, LABELS_FILE)
    return None if path is None else LabelMap.load(path)


def _beside(folder: Path, name: str) -> Path | None:
    """A file of the run: in the folder, or above it for a checkpoint."""
    places = [folder]
    if re.fullmatch(r"checkpoint-\d+", folder.name):
        places.append(folder.parent)
    return next((place / name for place in places if (place / name).is_file()), None)


def _numbered_labels(folder: Path) -> LabelMap | None:
    """As many classes as the saved head has rows, where nobody wrote down their names."""
    paths = [part / name for part in part_folders(folder) for name in WEIGHT_NAMES if (part / name).is_file()]
    heads = []
    for path in paths:  # a missing one is reported when the adapter is read
        with open_checkpoint(path) as tensors:
            heads += [tensors.info(name).shape for name in tensors if _HEAD_WEIGHT.search(name)]
    plain = [shape[0] for shape in heads if len(shape) == 2]
    return LabelMap(tuple(f"LABEL_{index}" for index in range(plain[0]))) if plain else None


def _labels_in_config(task_type: TaskType | None, task: str | None, model: nn.Cell) -> LabelMap | None:
    if task == "regression" or task_type not in (TaskType.SEQ_CLS, TaskType.TOKEN_CLS):
        return None
    return LabelMap.from_dict({"id2label": model.config.id2label})


def _guess_task(task_type: TaskType | None, model: nn.Cell) -> str | None:
    """The task as Hugging Face decides it where the configuration has no ``problem_type``."""
    if task_type == TaskType.TOKEN_CLS:
        return "token_classification"
    if task_type == TaskType.CAUSAL_LM:
        return "causal_lm"
    if task_type != TaskType.SEQ_CLS:
        return None
    one = model.config.num_labels == 1
    return model.config.problem_type or ("regression" if one else "single_label_classification")
