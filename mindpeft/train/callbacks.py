"""Hooks into a run, in the shape of Hugging Face's ``TrainerCallback``."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any

from mindpeft.train.arguments import TrainingArguments
from mindpeft.train.metrics import pick_metric


@dataclass
class TrainerState:
    """Where a run is; written to ``trainer_state.json`` in each checkpoint.

    Attributes:
        global_step: optimizer steps done.
        epoch: passes over the data done, a fraction within one.
        max_steps: optimizer steps of the whole run.
        num_train_epochs: passes begun when the run is over.
        best_metric: the best value of ``metric_for_best_model`` so far.
        best_step: the step of that evaluation.
        best_model_checkpoint: its folder.
        bad_evaluations: evaluations in a row that were not better.
        total_loss: sum of the losses of all steps.
        unlogged_losses: losses of the steps since the last line of the log.
        skipped_updates: steps left out because their gradient was not finite.
        log_history: all lines of the log.
    """

    global_step: int = 0
    epoch: float = 0.0
    max_steps: int = 0
    num_train_epochs: int = 0
    best_metric: float | None = None
    best_step: int | None = None
    best_model_checkpoint: str | None = None
    bad_evaluations: int = 0
    total_loss: float = 0.0
    unlogged_losses: list[float] = field(default_factory=list)
    skipped_updates: int = 0
    log_history: list[dict[str, Any]] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """All values by name, ready for JSON."""
        return dataclasses.asdict(self)


@dataclass
class TrainerControl:
    """What the loop does next; a callback sets these. All but the stops are cleared once done."""

    should_training_stop: bool = False
    should_epoch_stop: bool = False
    should_log: bool = False
    should_evaluate: bool = False
    should_save: bool = False


class TrainerCallback:
    """Override what you need. Each hook gets (args, state, control) and keyword arguments such as
    ``model``, ``metrics`` (on_evaluate), ``logs`` (on_log)."""

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Before the first step."""

    def on_epoch_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Before the first batch of an epoch."""

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Before the micro-batches of an optimizer step."""

    def on_substep_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """After a micro-batch that is not the last one of its step."""

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """After an optimizer step."""

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """After a line was added to the log (``logs``)."""

    def on_evaluate(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """After an evaluation (``metrics``)."""

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """After a checkpoint was written."""

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """After the last batch of an epoch."""

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """After the last step, also when the run is stopped by an error."""


class CallbackHandler:
    """Calls a hook of every callback, in order."""

    def __init__(self, callbacks: list[TrainerCallback]):
        self.callbacks = callbacks

    def call(
        self, hook: str, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs
    ):
        for callback in self.callbacks:
            getattr(callback, hook)(args, state, control, **kwargs)


class FlowCallback(TrainerCallback):
    """Decides by the arguments when to log, evaluate, save and end."""

    def on_step_end(self, args, state, control, **kwargs):
        step = state.global_step
        last = step >= state.max_steps
        control.should_log |= step % args.logging_steps == 0 or last
        if args.eval_strategy == "steps":
            control.should_evaluate |= step % args.eval_steps == 0 or last
        if args.save_strategy == "steps":
            control.should_save |= step % args.save_steps == 0 or last
        control.should_training_stop |= last

    def on_epoch_end(self, args, state, control, **kwargs):
        control.should_evaluate |= args.eval_strategy == "epoch"
        control.should_save |= args.save_strategy == "epoch"

    def on_evaluate(self, args, state, control, **kwargs):
        # The best model must be on disk to be loaded at the end.
        is_best = state.best_step == state.global_step
        control.should_save |= args.load_best_model_at_end and is_best


class BestMetricCallback(TrainerCallback):
    """Keeps the best evaluation in the state, and ends the run when patience is over (early stopping)."""

    def on_evaluate(self, args, state, control, metrics=None, **kwargs):
        value = pick_metric(metrics, args.metric_for_best_model)
        sign = 1.0 if args.greater_is_better else -1.0
        gain = None if state.best_metric is None else sign * (value - state.best_metric)
        if gain is None or gain > args.early_stopping_threshold:
            state.bad_evaluations = 0
        else:
            state.bad_evaluations += 1
        if gain is None or gain > 0:
            state.best_metric, state.best_step = value, state.global_step
        if args.early_stopping_patience is not None and state.bad_evaluations >= args.early_stopping_patience:
            control.should_training_stop = True
