"""The progress bar of a run, or plain lines where there is no terminal."""

from __future__ import annotations

import time

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from mindpeft.console import err, logger
from mindpeft.train.callbacks import TrainerCallback


class ProgressCallback(TrainerCallback):
    """A bar with step, loss, learning rate, samples/s and remaining time; the log's lines in a pipe."""

    def __init__(self) -> None:
        self.bar: Progress | None = None

    def on_train_begin(self, args, state, control, **kwargs):
        self.start, self.first_step = time.perf_counter(), state.global_step
        if not err.is_terminal:
            return
        columns = [TextColumn("train"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[facts]}")]
        self.bar = Progress(*columns, TimeRemainingColumn(), console=err, transient=True)
        self.task = self.bar.add_task("train", total=state.max_steps, completed=state.global_step, facts="")
        self.bar.start()

    def on_step_end(self, args, state, control, **kwargs):
        if self.bar is not None:
            self.bar.update(self.task, completed=state.global_step)

    def on_log(self, args, state, control, logs=None, **kwargs):
        facts = _facts(logs)
        if self.bar is not None and "loss" in logs:
            self.bar.update(self.task, facts=facts)
        else:
            left = "" if "loss" not in logs else f"  {self._remaining(state)} left"
            logger.info("step %d/%d  %s%s", state.global_step, state.max_steps, facts, left)

    def on_train_end(self, args, state, control, **kwargs):
        if self.bar is not None:
            self.bar.stop()
            self.bar = None

    def _remaining(self, state) -> str:
        done = state.global_step - self.first_step
        seconds = (time.perf_counter() - self.start) / max(1, done) * (state.max_steps - state.global_step)
        minutes, seconds = divmod(round(seconds), 60)
        return f"{minutes}:{seconds:02d}"


_FORMATS = {"learning_rate": ("lr", ".2e"), "samples_per_second": ("samples/s", ".1f")}
_HIDDEN = ("step", "epoch", "eval_runtime", "eval_samples_per_second", "grad_norm")


def _facts(logs: dict) -> str:
    words = []
    for key, value in logs.items():
        if key not in _HIDDEN:
            name, form = _FORMATS.get(key, (key, ".4f"))
            words.append(f"{name} {value:{form}}")
    return "  ".join(words)
