"""The Trainer: the loop around the compiled step."""

from __future__ import annotations

import math
import time
from pathlib import Path
from typing import Any, NamedTuple

import mindspore as ms
from mindspore import nn

from mindpeft.console import logger
from mindpeft.device import setup_device
from mindpeft.errors import InputError
from mindpeft.nn.checkpointing import set_checkpointing
from mindpeft.train.arguments import TrainingArguments
from mindpeft.train.batches import Batch, Batches, in_groups, make_batches, real_rows, tokenised
from mindpeft.train.callbacks import (
    BestMetricCallback,
    CallbackHandler,
    FlowCallback,
    TrainerCallback,
    TrainerControl,
    TrainerState,
)
from mindpeft.train.checkpoints import (
    check_output_dir,
    checkpoint_folder,
    find_checkpoint,
    how_to_resume,
    list_checkpoints,
    load_checkpoint,
    load_weights,
    remove_checkpoints,
    remove_old_checkpoints,
    save_checkpoint,
)
from mindpeft.train.curves import CURVES_FILE, save_curves
from mindpeft.train.evaluation import ComputeMetrics, PredictionOutput, evaluate
from mindpeft.train.interrupt import InterruptGuard, TrainingInterrupted
from mindpeft.train.log import LogFileCallback
from mindpeft.train.lora_optim import make_optimizer
from mindpeft.train.metrics import Metrics
from mindpeft.train.progress import ProgressCallback
from mindpeft.train.report import RunReport, make_report
from mindpeft.train.runner import StepRunner
from mindpeft.train.schedules import Schedule, get_schedule
from mindpeft.train.seeding import seed_everything


class TrainOutput(NamedTuple):
    """What ``Trainer.train`` returns; ``training_loss`` is the mean over all steps."""

    global_step: int
    training_loss: float
    metrics: dict[str, Any]


class NonFiniteLossError(InputError):
    """The loss became NaN or infinite; the weights are those before that step."""


class Trainer:
    """Trains, evaluates and predicts, in the shape of Hugging Face's ``Trainer``.

    Args:
        model: a Cell that returns logits, or ``(loss, logits)`` given ``labels``; its parameters with
            ``requires_grad`` are trained. ``save_pretrained(folder)`` writes its files if it has one.
        args: see :class:`TrainingArguments`.
        train_dataset, eval_dataset: lists of feature dicts (``input_ids``, ``labels``, ...), batchers of
            ``mindpeft.data``, or ``mindspore.dataset.Dataset`` objects with such columns or with texts.
        processing_class: the tokenizer; gives the padding id and is saved with the model if it can be.
        compute_metrics: from an ``EvalPrediction`` to a dict of numbers; default: what fits the labels.
        callbacks: called in order, after the built-in ones that decide and before those that write.
        tokenizer: another name of ``processing_class``.
    """

    def __init__(
        self,
        model: nn.Cell,
        args: TrainingArguments,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: Any = None,
        compute_metrics: ComputeMetrics | None = None,
        callbacks: list[TrainerCallback] | None = None,
        tokenizer: Any = None,
    ):
        self.model, self.args = model, args
        self.train_dataset, self.eval_dataset = train_dataset, eval_dataset
        self.processing_class = processing_class if processing_class is not None else tokenizer
        self.compute_metrics = compute_metrics
        if args.eval_strategy != "no" and eval_dataset is None:
            raise InputError(f"eval_strategy {args.eval_strategy!r} needs an eval_dataset")
        self.state, self.control = TrainerState(), TrainerControl()
        deciders = [FlowCallback()] if args.eval_strategy == "no" else [BestMetricCallback(), FlowCallback()]
        writers = [LogFileCallback(), ProgressCallback()] if args.progress else [LogFileCallback()]
        self.callbacks = CallbackHandler([*deciders, *(callbacks or []), *writers])
        self.output_dir = Path(args.output_dir)
        self.report: RunReport | None = None
        self._runner = StepRunner(model)
        self._eval_batches: tuple[Any, Batches] | None = None
        self._use_device()

    # --- training

    def train(self, resume_from_checkpoint: str | bool | None = None) -> TrainOutput:
        """Train to the end, or to the early stop.

        Args:
            resume_from_checkpoint: True for the last checkpoint in ``output_dir``, or a checkpoint's folder;
                default: what the arguments say. The run continues as if it had not been interrupted, but
                for what is random in it: dropout, and the gates of diff pruning until they are pruned,
                begin their random numbers anew.

        Raises:
            InputError: nothing to train on, ``output_dir`` not empty, or a checkpoint that does not fit.
            NonFiniteLossError: the loss became NaN or infinite.
            TrainingInterrupted: Ctrl-C; the last step has a checkpoint, unless ``save_strategy="no"``.
        """
        args = self.args
        wanted = args.resume_from_checkpoint if resume_from_checkpoint is None else resume_from_checkpoint
        resume = find_checkpoint(self.output_dir, wanted)
        check_output_dir(self.output_dir, may_hold_files=bool(resume) or args.overwrite_output_dir)
        if self.train_dataset is None:
            raise InputError("nothing to train on: give the Trainer a train_dataset")
        self._use_device()
        seed_everything(self.model, args.seed)
        batches = self._make_batches(self.train_dataset, args.per_device_train_batch_size, shuffle=True)
        self._begin(batches, resume)
        with InterruptGuard() as guard:
            try:
                self._call("on_train_begin")
                self._epochs(batches, guard)
            finally:
                self._call("on_train_end")
        if guard.requested:
            self._stop_interrupted()
        return self._finish()

    def _begin(self, batches: Batches, resume: Path | None) -> None:
        """Make optimizer, schedule and state for a new run, or as the checkpoint has them."""
        args = self.args
        if args.gradient_checkpointing:
            set_checkpointing(self.model, True)
        self.optimizer = make_optimizer(self.model, args)
        self._runner = StepRunner(
            self.model, self.optimizer, args.gradient_accumulation_steps, args.max_grad_norm
        )
        hooks = self._runner.hooks
        self.state = load_checkpoint(resume, self.optimizer, hooks) if resume else TrainerState()
        self.control = TrainerControl()
        self._steps_per_epoch = math.ceil(len(batches) / args.gradient_accumulation_steps)
        total = (
            args.max_steps if args.max_steps > 0 else math.ceil(args.num_train_epochs * self._steps_per_epoch)
        )
        self.state.max_steps, self.state.num_train_epochs = total, math.ceil(total / self._steps_per_epoch)
        self._schedule: Schedule = get_schedule(args.lr_scheduler_type, args.get_warmup_steps(total), total)
        self._rows = self._rows_logged = 0
        self._started = self._last_log = time.perf_counter()
        if resume is None:
            remove_checkpoints(list_checkpoints(self.output_dir))  # of the run that is being overwritten
        else:
            logger.info("resuming from %s at step %d of %d", resume, self.state.global_step, total)

    def _epochs(self, batches: Batches, guard: InterruptGuard) -> None:
        state, control = self.state, self.control
        accumulation = self.args.gradient_accumulation_steps
        while state.global_step < state.max_steps and not control.should_training_stop:
            epoch, done = divmod(state.global_step, self._steps_per_epoch)
            batches.set_epoch(epoch, skip_batches=done * accumulation)
            control.should_epoch_stop = False
            self._call("on_epoch_begin")
            for group in in_groups(batches, accumulation):
                self._call("on_step_begin")
                self._optimizer_step(group)
                self._call("on_step_end")
                self._act()
                if guard.requested:
                    return
                if control.should_training_stop or control.should_epoch_stop:
                    break
            self._call("on_epoch_end")
            self._act()

    def _optimizer_step(self, group: list[Batch]) -> None:
        state = self.state
        self._learning_rate = self.args.learning_rate * self._schedule(state.global_step)
        losses = []
        for number, batch in enumerate(group, start=1):
            update = number == len(group)
            loss, self._norm = self._runner.train(
                batch, state.global_step + 1, self._learning_rate, update, 1.0 / len(group)
            )
            losses.append(loss)
            self._rows += int(real_rows(batch).sum())
            if not update:
                self._call("on_substep_end")
        self._book(sum(losses) / len(losses))

    def _book(self, loss: float) -> None:
        """Count a step whose loss and gradient are finite; end the run, or leave the step out, otherwise."""
        state = self.state
        state.global_step += 1
        state.epoch = state.global_step / self._steps_per_epoch
        if math.isfinite(loss) and math.isfinite(self._norm):
            state.total_loss += loss
            state.unlogged_losses.append(loss)
            return
        what = f"loss {loss}" if not math.isfinite(loss) else f"gradient norm {self._norm}"
        message = f"{what} at step {state.global_step} (learning rate {self._learning_rate:.3g})"
        if self.args.stop_on_nonfinite_loss:
            raise NonFiniteLossError(
                f"{message}: lower the learning rate or max_grad_norm, or look for broken rows; "
                f"the weights are those before this step{how_to_resume(self.output_dir)}"
            )
        state.skipped_updates += 1
        logger.warning("%s: this update is left out", message)

    def _act(self) -> None:
        """Do what the callbacks asked for; saving comes last, so that a checkpoint knows all."""
        control = self.control
        if control.should_log:
            control.should_log = False
            self._log_step()
        if control.should_evaluate and self.eval_dataset is not None:
            control.should_evaluate = False
            self._call("on_evaluate", metrics=self.evaluate())
        if control.should_save:
            control.should_save = False
            self._save_checkpoint()

    def _log_step(self) -> None:
        state = self.state
        if not state.unlogged_losses:
            return
        now = time.perf_counter()
        logs = {
            "loss": sum(state.unlogged_losses) / len(state.unlogged_losses),
            "learning_rate": self._learning_rate,
            "grad_norm": self._norm,
            "samples_per_second": round((self._rows - self._rows_logged) / (now - self._last_log), 1),
        }
        state.unlogged_losses, self._rows_logged, self._last_log = [], self._rows, now
        self.log(logs)

    def log(self, logs: dict[str, Any]) -> None:
        """Add a line to the log, with the epoch and the step."""
        line = {"step": self.state.global_step, "epoch": round(self.state.epoch, 4), **logs}
        self.state.log_history.append(line)
        self._call("on_log", logs=line)

    # --- evaluation

    def evaluate(self, eval_dataset: Any = None, metric_key_prefix: str = "eval") -> Metrics:
        """Mean loss and metrics on ``eval_dataset`` (default: the Trainer's own), also added to the log.

        Raises:
            InputError: there is no data set.
        """
        dataset = self.eval_dataset if eval_dataset is None else eval_dataset
        if dataset is None:
            raise InputError("nothing to evaluate: give an eval_dataset")
        metrics = self._evaluate(dataset, metric_key_prefix, loss_only=self.args.prediction_loss_only).metrics
        self.log(metrics)
        return metrics

    def predict(self, test_dataset: Any, metric_key_prefix: str = "test") -> PredictionOutput:
        """Logits in the data set's order, its labels, and metrics if it has labels."""
        return self._evaluate(test_dataset, metric_key_prefix, keep_logits=True)

    def _evaluate(self, dataset: Any, prefix: str, **options: bool) -> PredictionOutput:
        if self._eval_batches is None or self._eval_batches[0] is not dataset:
            batches = self._make_batches(dataset, self.args.per_device_eval_batch_size, shuffle=False)
            self._eval_batches = (dataset, batches)
        output = evaluate(
            self.model,
            self._runner,
            self._eval_batches[1],
            compute_metrics=self.compute_metrics,
            prefix=prefix,
            **options,
        )
        self._last_log = time.perf_counter()  # evaluation does not count in the training's samples/s
        return output

    # --- files

    def save_model(self, output_dir: str | None = None) -> Path | None:
        """Write the files of model (adapter) and tokenizer; returns the folder, None without files."""
        folder = self.output_dir if output_dir is None else Path(output_dir)
        if not hasattr(self.model, "save_pretrained"):
            logger.warning("%s has no save_pretrained: nothing saved", type(self.model).__name__)
            return None
        folder.mkdir(parents=True, exist_ok=True)
        self.model.save_pretrained(folder)
        if hasattr(self.processing_class, "save_pretrained"):
            self.processing_class.save_pretrained(folder)
        return folder

    def _save_checkpoint(self) -> None:
        state = self.state
        folder = checkpoint_folder(self.output_dir, state.global_step)
        if state.best_step == state.global_step:
            state.best_model_checkpoint = str(folder)
        save_checkpoint(folder, self.model, self.optimizer, state, self._runner.hooks)
        remove_old_checkpoints(self.output_dir, state, self.args.save_total_limit)
        self._call("on_save")

    # --- the end

    def _stop_interrupted(self) -> None:
        if self.args.save_strategy != "no":
            self._save_checkpoint()
        raise TrainingInterrupted(
            f"stopped after step {self.state.global_step} of {self.state.max_steps}"
            f"{how_to_resume(self.output_dir)}"
        )

    def _finish(self) -> TrainOutput:
        state, args = self.state, self.args
        if args.load_best_model_at_end and state.best_model_checkpoint:
            load_weights(Path(state.best_model_checkpoint), self.optimizer, self._runner.hooks)
            logger.info("took the best model, of step %d", state.best_step)
        saved_to = self.save_model()
        save_curves(self.output_dir / CURVES_FILE, state.log_history)
        self.report = make_report(self.model, self._runner, state, args, self._rows, saved_to)
        self.report.print()
        loss = state.total_loss / max(1, state.global_step - state.skipped_updates)
        runtime = round(time.perf_counter() - self._started, 3)
        metrics = {
            "train_loss": loss,
            "train_runtime": runtime,
            **self.report.metrics(),
            "epoch": state.epoch,
        }
        return TrainOutput(state.global_step, loss, metrics)

    def _use_device(self) -> None:
        """Set the mode; the device too, if the arguments name one ("auto" keeps what the process uses)."""
        args = self.args
        if args.device != "auto":
            setup_device(args.device, args.device_id)
        ms.set_context(mode=ms.GRAPH_MODE if args.jit else ms.PYNATIVE_MODE)

    def _padding(self) -> int:
        """The tokenizer's padding token or, without one, the model's."""
        config = getattr(self.model, "config", None)
        found = (getattr(source, "pad_token_id", None) for source in (self.processing_class, config))
        return next((token for token in found if token is not None), 0)

    def _make_batches(self, dataset: Any, batch_size: int, shuffle: bool) -> Batches:
        return make_batches(
            tokenised(dataset, self.processing_class, self.model, self.args.max_length),
            batch_size,
            pad_token_id=self._padding(),
            max_buckets=self.args.max_buckets,
            max_length=self.args.max_length,
            shuffle=shuffle,
            seed=self.args.seed,
        )

    def _call(self, hook: str, **kwargs: Any) -> None:
        self.callbacks.call(hook, self.args, self.state, self.control, model=self.model, **kwargs)
