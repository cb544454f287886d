"""Multitask prompt tuning: one prompt for several tasks, scaled by a thin matrix product for each of them.

Wang et al. 2023, "Multitask Prompt Tuning Enables Parameter-Efficient Transfer Learning": the prompt of task
k is P * (C_k R_k), element by element, with P (T, width), C_k (T, r) and R_k (r, width). The model takes one
more argument, ``task_ids`` (batch,), which says each text's task; it may be left out where there is one task
alone. ``prompt_learning`` says how virtual tokens meet masks, positions, token types, labels and outputs.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

import mindspore as ms
import numpy as np
from mindspore import ops

from mindpeft.config import PeftType, register_method
from mindpeft.convert.checkpoint import open_checkpoint
from mindpeft.errors import InputError
from mindpeft.ops.losses import IGNORED_LABEL
from mindpeft.tuners.base import Shapes, Site, Slot, Tensors
from mindpeft.tuners.prompt_layers import PromptLayer
from mindpeft.tuners.prompt_learning import OUTPUT
from mindpeft.tuners.prompt_tuning import PromptEmbedding, PromptTuningConfig
from mindpeft.tuners.targeted import check_count

if TYPE_CHECKING:
    from mindpeft.tuners.plan import BaseModel

COLUMNS, ROWS = "prefix_task_cols", "prefix_task_rows"
_OF_ONE_TASK = ("AVERAGE_SOURCE_TASKS", "EXACT_SOURCE_TASK")


@register_method
@dataclass
class MultitaskPromptTuningConfig(PromptTuningConfig):
    """Hugging Face PEFT's configuration of multitask prompt tuning, key by key; see ``PromptTuningConfig``.

    Attributes:
        prompt_tuning_init: "RANDOM", "TEXT", or from an adapter of source tasks: "AVERAGE_SOURCE_TASKS" (the
            mean of their matrices), "EXACT_SOURCE_TASK" (those of one task), "ONLY_SOURCE_SHARED" (the shared
            prompt alone).
        prompt_tuning_init_state_dict_path: the weights file of that adapter.
        prompt_tuning_init_task: which of its tasks.
        num_ranks: r, the columns of C_k.
        num_tasks: how many tasks; 1 when it starts from one task's or the mean matrices.

    Raises:
        InputError: a value is not allowed, or keys contradict each other.
    """

    prompt_tuning_init_state_dict_path: str | None = None
    prompt_tuning_init_task: int | None = 0
    num_ranks: int | None = 1
    num_tasks: int | None = 1

    METHOD: ClassVar[PeftType] = PeftType.MULTITASK_PROMPT_TUNING
    INITS: ClassVar[tuple[str, ...]] = ("TEXT", "RANDOM", *_OF_ONE_TASK, "ONLY_SOURCE_SHARED")

    def __post_init__(self) -> None:
        super().__post_init__()
        for key, least in (("num_ranks", 1), ("num_tasks", 1), ("prompt_tuning_init_task", 0)):
            check_count(key, getattr(self, key), least)
        if self.from_source and not self.prompt_tuning_init_state_dict_path:
            raise InputError(
                f"prompt_tuning_init {self.prompt_tuning_init} needs prompt_tuning_init_state_dict_path"
            )
        if self.prompt_tuning_init in _OF_ONE_TASK and self.num_tasks != 1:
            raise InputError(
                f"prompt_tuning_init {self.prompt_tuning_init} gives one task: num_tasks must be 1, "
                f"not {self.num_tasks}"
            )

    @property
    def from_source(self) -> bool:
        """Whether a fresh adapter starts from one of source tasks."""
        return self.prompt_tuning_init.endswith(("SOURCE_TASKS", "SOURCE_TASK", "SOURCE_SHARED"))

    def slot_classes(self, base: BaseModel) -> dict[str, type[Slot]]:
        return dict.fromkeys(super().slot_classes(base), MultitaskPromptEmbedding)


class MultitaskPromptEmbedding(PromptLayer):
    """The shared prompt and the matrices of every task."""

    MORE_ARGUMENTS = ("task_ids",)

    @classmethod
    def tensor_shapes(cls, site: Site) -> Shapes:
        (count, width), ranks, tasks = cls.width_of(site), site.config.num_ranks, site.config.num_tasks
        return {OUTPUT: (count, width), COLUMNS: (tasks, count, ranks), ROWS: (tasks, ranks, width)}

    @classmethod
    def file_shapes(cls, site: Site) -> Shapes:
        return cls.tensor_shapes(site)

    @classmethod
    def initial_tensors(cls, site: Site) -> Tensors:
        shapes = cls.tensor_shapes(site)
        tensors = {} if site.config.from_source else PromptEmbedding.initial_tensors(site)
        for name in (COLUMNS, ROWS):
            tensors[name] = np.random.normal(0, 0.02, shapes[name]).astype(np.float32)
        if site.config.from_source:
            tensors |= source_tensors(site.config, shapes)
        return {name: tensors[name] for name in shapes}

    def prompts(self, arguments: tuple) -> ms.Tensor:
        tasks, width = self.prefix_task_rows.shape[0], self.prefix_task_rows.shape[2]
        ids = arguments[self.passed_on]
        check_told(ids is not None, tasks)
        if ids is None:
            product = ops.matmul(self.prefix_task_cols[0], self.prefix_task_rows[0])
            return self.prompt_embeddings * product
        ids = ops.select(ops.equal(ids, IGNORED_LABEL), ops.zeros_like(ids), ids)  # rows that fill up a batch
        columns = ops.gather(self.prefix_task_cols, ids, 0)
        product = ops.BatchMatMul()(columns, ops.gather(self.prefix_task_rows, ids, 0))
        shared = ops.reshape(self.prompt_embeddings, (1, -1, width))
        return ops.tile(shared, (ids.shape[0], 1, 1)) * product


def source_tensors(config: MultitaskPromptTuningConfig, shapes: Shapes) -> Tensors:
    """What a fresh adapter takes over from one of source tasks.

    Raises:
        InputError: the file can't be read, lacks a tensor, or holds other shapes or fewer tasks.
    """
    path = Path(config.prompt_tuning_init_state_dict_path)
    wanted = (OUTPUT, COLUMNS, ROWS) if config.prompt_tuning_init in _OF_ONE_TASK else (OUTPUT,)
    with open_checkpoint(path) as checkpoint:
        missing = [name for name in wanted if name not in checkpoint]
        if missing:
            raise InputError(f"{path} holds no multitask prompts: {', '.join(missing)} is missing")
        tensors = {name: checkpoint[name].numpy().astype(np.float32) for name in wanted}
    for name in wanted[1:]:
        if config.prompt_tuning_init == "AVERAGE_SOURCE_TASKS":
            tensors[name] = tensors[name].mean(0, keepdims=True)
            continue
        tasks = len(tensors[name])
        if config.prompt_tuning_init_task >= tasks:
            raise InputError(
                f"prompt_tuning_init_task is {config.prompt_tuning_init_task}, but {path} has {tasks} tasks"
            )
        tensors[name] = tensors[name][config.prompt_tuning_init_task][None]
    for name, value in tensors.items():
        if value.shape != shapes[name]:
            raise InputError(f"{path}: {name} gives the shape {value.shape}, but {shapes[name]} is needed")
    return tensors


@ops.constexpr
def check_told(told: bool, tasks: int) -> None:
    """Raise ``InputError`` if a call does not say the tasks of its texts where there are several."""
    if not told and tasks > 1:
        raise InputError(f"task_ids is missing: a number below {tasks} for each text of the batch")
