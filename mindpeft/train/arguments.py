"""TrainingArguments: everything that a run can be told, checked when it is made."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from mindpeft.device import DEVICES
from mindpeft.errors import InputError, did_you_mean
from mindpeft.train.schedules import SHAPES

_INTERVALS = ("no", "steps", "epoch")
_CHOICES: dict[str, tuple[str, ...]] = {
    "lr_scheduler_type": tuple(SHAPES),
    "optim": ("adamw", "lorafa"),
    "eval_strategy": _INTERVALS,
    "save_strategy": _INTERVALS,
    "device": ("auto", *DEVICES),
}


def _at_least(low: float) -> tuple[Callable[[Any], bool], str]:
    return lambda value: value >= low, f"at least {low}"


def _above(low: float) -> tuple[Callable[[Any], bool], str]:
    return lambda value: value > low, f"greater than {low}"


_SHARE = (lambda value: 0 <= value < 1, "in [0, 1)")
_WHOLE: dict[str, tuple[Callable[[Any], bool], str]] = {
    "max_steps": (lambda value: value == -1 or value > 0, "positive, or -1 for none"),
    "per_device_train_batch_size": _at_least(1),
    "per_device_eval_batch_size": _at_least(1),
    "gradient_accumulation_steps": _at_least(1),
    "warmup_steps": _at_least(0),
    "logging_steps": _at_least(1),
    "eval_steps": _at_least(1),
    "save_steps": _at_least(1),
    "save_total_limit": _at_least(1),
    "early_stopping_patience": _at_least(1),
    "seed": (lambda value: 0 <= value < 2**32, "from 0 to 2**32 - 1"),
    "max_length": _at_least(1),
    "max_buckets": _at_least(1),
    "device_id": _at_least(0),
}
_REAL: dict[str, tuple[Callable[[Any], bool], str]] = {
    "num_train_epochs": _above(0),
    "learning_rate": _above(0),
    "weight_decay": _at_least(0),
    "adam_beta1": _SHARE,
    "adam_beta2": _SHARE,
    "adam_epsilon": _above(0),
    "loraplus_lr_ratio": _above(0),
    "loraplus_lr_embedding": _above(0),
    "max_grad_norm": _at_least(0),
    "warmup_ratio": (lambda value: 0 <= value <= 1, "in [0, 1]"),
    "early_stopping_threshold": _at_least(0),
}


@dataclass
class TrainingArguments:
    """How to train, in the names of Hugging Face's ``TrainingArguments``.

    Args:
        output_dir: folder of checkpoints, ``train_log.jsonl`` and ``curves.png``.
        overwrite_output_dir: write into a folder that is not empty.
        num_train_epochs: passes over the data; may be a fraction.
        max_steps: optimizer steps, overrides ``num_train_epochs``; -1 for none.
        per_device_train_batch_size, per_device_eval_batch_size: rows of a batch.
        gradient_accumulation_steps: micro-batches per optimizer step.
        gradient_checkpointing: keep nothing of a layer for the backward pass but its input, and compute the
            layer again: less memory, a third more time.
        learning_rate: the peak.
        weight_decay: AdamW's, decoupled; biases and norms are spared.
        adam_beta1, adam_beta2, adam_epsilon: AdamW's.
        optim: ``adamw``; ``lorafa`` for LoRA-FA, which trains only B of a LoRA adapter.
        loraplus_lr_ratio: LoRA+: B of a LoRA adapter learns at this many times ``learning_rate``.
        loraplus_lr_embedding: LoRA+: the learning rate of a LoRA adapter's embeddings.
        max_grad_norm: global norm to clip the gradient to; 0 for no clipping.
        lr_scheduler_type: ``linear``, ``cosine`` or ``constant``, after the warm-up.
        warmup_ratio: warm-up's share of all optimizer steps.
        warmup_steps: warm-up in optimizer steps; overrides ``warmup_ratio`` if greater than 0.
        logging_steps: optimizer steps between two lines of the log.
        eval_strategy: evaluate never (``no``), every ``eval_steps`` (``steps``) or after each ``epoch``.
        eval_steps: optimizer steps between evaluations; ``logging_steps`` if None.
        save_strategy: write checkpoints never, every ``save_steps`` or after each ``epoch``.
        save_steps: optimizer steps between checkpoints.
        save_total_limit: keep that many checkpoints, the best one always; all if None.
        load_best_model_at_end: finish with the weights of the best evaluation.
        metric_for_best_model: an evaluated metric, ``loss`` if None.
        greater_is_better: None: yes, but for a metric that ends in ``loss`` or ``perplexity``.
        early_stopping_patience: stop after that many evaluations in a row without a better metric.
        early_stopping_threshold: what counts as better must be better by more than that.
        stop_on_nonfinite_loss: end the run when the loss is NaN or infinite; else leave that update out.
        prediction_loss_only: evaluate the loss alone and keep no logits.
        seed: of shuffling and dropout; fixes a run bit by bit.
        resume_from_checkpoint: True for the last checkpoint in ``output_dir``, or a checkpoint's folder.
        max_length: rows are padded to no more than this many tokens.
        max_buckets: most padded lengths, each of which is a compiled graph.
        device, device_id: see ``mindpeft.device.setup_device``.
        jit: compile the step to a graph; False runs it operator by operator (PyNative).
        progress: show a progress bar (plain lines where there is no terminal).

    Raises:
        InputError: a value out of range or of the wrong kind, or two that contradict each other.
    """

    output_dir: str
    overwrite_output_dir: bool = False
    num_train_epochs: float = 3.0
    max_steps: int = -1
    per_device_train_batch_size: int = 8
    per_device_eval_batch_size: int = 8
    gradient_accumulation_steps: int = 1
    gradient_checkpointing: bool = False
    learning_rate: float = 5e-5
    weight_decay: float = 0.0
    adam_beta1: float = 0.9
    adam_beta2: float = 0.999
    adam_epsilon: float = 1e-8
    optim: str = "adamw"
    loraplus_lr_ratio: float | None = None
    loraplus_lr_embedding: float = 1e-6
    max_grad_norm: float = 1.0
    lr_scheduler_type: str = "linear"
    warmup_ratio: float = 0.0
    warmup_steps: int = 0
    logging_steps: int = 10
    eval_strategy: str = "no"
    eval_steps: int | None = None
    save_strategy: str = "epoch"
    save_steps: int = 500
    save_total_limit: int | None = None
    load_best_model_at_end: bool = False
    metric_for_best_model: str | None = None
    greater_is_better: bool | None = None
    early_stopping_patience: int | None = None
    early_stopping_threshold: float = 0.0
    stop_on_nonfinite_loss: bool = True
    prediction_loss_only: bool = False
    seed: int = 42
    resume_from_checkpoint: str | bool | None = None
    max_length: int | None = None
    max_buckets: int = 4
    device: str = "auto"
    device_id: int | None = None
    jit: bool = True
    progress: bool = True

    def __post_init__(self) -> None:
        if not isinstance(self.output_dir, str) or not self.output_dir:
            raise InputError(f"output_dir must name a folder, not {self.output_dir!r}")
        for field in dataclasses.fields(self):
            self._check_field(field)
        self._check_combinations()
        if self.eval_steps is None:
            self.eval_steps = self.logging_steps
        if self.metric_for_best_model is None:
            self.metric_for_best_model = "loss"
        if self.greater_is_better is None:
            self.greater_is_better = not self.metric_for_best_model.endswith(("loss", "perplexity"))

    def _check_field(self, field: dataclasses.Field) -> None:
        name, value = field.name, getattr(self, field.name)
        if value is None:
            if field.default is not None:
                raise InputError(f"{name} must have a value, not None")
        elif name in _CHOICES:
            if value not in _CHOICES[name]:
                choices = _CHOICES[name]
                raise InputError(
                    f"{name} must be one of {', '.join(choices)}, not {value!r}{did_you_mean(value, choices)}"
                )
        elif name in _WHOLE or name in _REAL:
            self._check_number(name, value)
        elif field.type in ("bool", "bool | None") and not isinstance(value, bool):
            raise InputError(f"{name} must be true or false, not {value!r}")

    def _check_number(self, name: str, value: Any) -> None:
        kinds, word = ((int,), "a whole number") if name in _WHOLE else ((int, float), "a number")
        if isinstance(value, bool) or not isinstance(value, kinds) or not math.isfinite(value):
            raise InputError(f"{name} must be {word}, not {value!r}")
        is_right, words = (_WHOLE | _REAL)[name]
        if not is_right(value):
            raise InputError(f"{name} must be {words}, not {value!r}")

    def _check_combinations(self) -> None:
        if self.optim == "lorafa" and self.loraplus_lr_ratio is not None:
            raise InputError("loraplus_lr_ratio is for optim=adamw: LoRA-FA trains only B")
        if self.gradient_checkpointing and not self.jit:
            raise InputError("gradient_checkpointing needs jit: layers are computed again in a graph alone")
        if self.load_best_model_at_end:
            if self.eval_strategy == "no":
                raise InputError(
                    "load_best_model_at_end needs evaluations: set eval_strategy to steps or epoch"
                )
            if self.save_strategy == "no":
                raise InputError(
                    "load_best_model_at_end needs checkpoints: set save_strategy to steps or epoch"
                )
        if self.early_stopping_patience is not None and self.eval_strategy == "no":
            raise InputError("early_stopping_patience needs evaluations: set eval_strategy to steps or epoch")

    def get_warmup_steps(self, total_steps: int) -> int:
        """Optimizer steps of warm-up in a run of ``total_steps``."""
        return self.warmup_steps if self.warmup_steps > 0 else math.ceil(total_steps * self.warmup_ratio)

    def to_dict(self) -> dict[str, Any]:
        """All values by name, ready for JSON."""
        return dataclasses.asdict(self)
