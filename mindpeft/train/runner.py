"""Runs the compiled steps on numpy batches, and counts what compiling them costs."""

from __future__ import annotations

import time
from collections.abc import Callable
from statistics import median
from typing import Any

import mindspore as ms
import numpy as np
from mindspore import Tensor, nn

from mindpeft.errors import InputError
from mindpeft.train.batches import Batch, model_inputs
from mindpeft.train.optim import AdamW
from mindpeft.train.step import EvalStep, TrainStep, accepted_arguments
from mindpeft.tuners.hooks import TrainingHook


class CompileClock:
    """Times calls by input shape: the first call of a shape compiles its graph, later ones only run it."""

    def __init__(self) -> None:
        self.seconds: dict[Any, list[float]] = {}

    def call(self, key: Any, function: Callable[[], Any]) -> Any:
        """Call ``function``, which must wait for its results, and book its time under ``key``."""
        start = time.perf_counter()
        result = function()
        self.seconds.setdefault(key, []).append(time.perf_counter() - start)
        return result

    @property
    def graphs(self) -> int:
        """Different shapes seen."""
        return len(self.seconds)

    @property
    def calls(self) -> int:
        """All calls booked."""
        return sum(len(times) for times in self.seconds.values())

    @property
    def compile_seconds(self) -> float:
        """First calls, less the median later call of the same shape (less nothing if there was only one)."""
        return sum(times[0] - (median(times[1:]) if times[1:] else 0.0) for times in self.seconds.values())

    @property
    def median_seconds(self) -> float | None:
        """The median of all calls but first ones; None before there is one."""
        later = [seconds for times in self.seconds.values() for seconds in times[1:]]
        return median(later) if later else None


class StepRunner:
    """Holds the steps of one model for batches of one set of columns.

    Args:
        model: see ``TrainStep``.
        optimizer: None if it only evaluates.
        accumulation_steps, max_grad_norm: see ``TrainStep``.
    """

    def __init__(
        self,
        model: nn.Cell,
        optimizer: AdamW | None = None,
        accumulation_steps: int = 1,
        max_grad_norm: float = 1.0,
    ):
        self.model = model
        self.accepted = accepted_arguments(model)
        self.optimizer = optimizer
        trains = optimizer is not None and hasattr(model, "training_hooks")
        self.hooks: list[TrainingHook] = model.training_hooks() if trains else []
        self.accumulation_steps = accumulation_steps
        self.max_grad_norm = max_grad_norm
        self.train_clock = CompileClock()
        self.eval_clock = CompileClock()
        self._train_step: TrainStep | None = None
        self._train_columns: tuple[str, ...] = ()
        self._eval_steps: dict[tuple, EvalStep] = {}

    def train(
        self, batch: Batch, step: int, learning_rate: float, update: bool = True, share: float = 1.0
    ) -> tuple[float, float]:
        """Run one micro-batch and return its loss and the gradient's norm; see ``TrainStep.construct``.

        Raises:
            InputError: the batch has other columns than the first one.
        """
        inputs = model_inputs(batch, self.accepted)
        columns = tuple(inputs)
        if self._train_step is None:
            self._train_columns = columns
            self._train_step = TrainStep(
                self.model, columns, self.optimizer, self.accumulation_steps, self.max_grad_norm, self.hooks
            )
        if columns != self._train_columns:
            raise InputError(
                f"batches must have the same columns: first {', '.join(self._train_columns)}, "
                f"now {', '.join(columns)}"
            )
        self._train_step.set_train(True)
        tensors = _tensors(inputs)
        scalars = self.optimizer.scalars(step, learning_rate)

        def run() -> tuple[float, float]:
            loss, norm = self._train_step(Tensor(update), Tensor(share, ms.float32), *scalars, *tensors)
            return float(loss.asnumpy()), float(norm.asnumpy())

        result = self.train_clock.call(_key(inputs), run)
        for hook in self.hooks if update else ():
            hook.after_step(step)
        return result

    def evaluate(self, batch: Batch, loss_only: bool = False) -> tuple[float | None, np.ndarray | None]:
        """Run one batch and return its loss (None without labels) and its logits.

        Args:
            batch: the batch.
            loss_only: leave the logits out, which of language models are large; needs labels.
        """
        inputs = model_inputs(batch, self.accepted)
        kind = (tuple(inputs), loss_only)
        if kind not in self._eval_steps:
            self._eval_steps[kind] = EvalStep(self.model, tuple(inputs), loss_only)
        step = self._eval_steps[kind].set_train(False)
        tensors = _tensors(inputs)

        def run() -> tuple[float | None, np.ndarray | None]:
            result = step(*tensors)
            if loss_only:
                return float(result.asnumpy()), None
            if "labels" in inputs:
                return float(result[0].asnumpy()), _float_array(result[1])
            return None, _float_array(result)

        return self.eval_clock.call((loss_only, *_key(inputs)), run)

    @property
    def graphs(self) -> int:
        """Graphs compiled; 0 in PyNative mode."""
        return self.train_clock.graphs + self.eval_clock.graphs if _is_graph_mode() else 0

    @property
    def compile_seconds(self) -> float:
        """Seconds spent compiling, see ``CompileClock``; 0 in PyNative mode."""
        clocks = (self.train_clock, self.eval_clock)
        return sum(clock.compile_seconds for clock in clocks) if _is_graph_mode() else 0.0

    @property
    def cached_graphs(self) -> int:
        """MindSpore's own count of the graphs that it holds for these steps."""
        steps = [step for step in (self._train_step, *self._eval_steps.values()) if step is not None]
        return sum(len(step.compile_cache) for step in steps)


def _is_graph_mode() -> bool:
    return ms.get_context("mode") == ms.GRAPH_MODE


def _tensors(inputs: Batch) -> list[Tensor]:
    return [Tensor(column) for column in inputs.values()]


def _key(inputs: Batch) -> tuple:
    return tuple((name, column.shape, column.dtype.str) for name, column in inputs.items())


def _float_array(logits: Tensor) -> np.ndarray:
    if logits.dtype in (ms.float16, ms.bfloat16):
        logits = logits.astype(ms.float32)
    return logits.asnumpy()
