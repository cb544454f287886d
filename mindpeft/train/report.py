"""The short table that a run ends with."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mindspore import nn
from rich.table import Table

from mindpeft.console import err

if TYPE_CHECKING:
    from mindpeft.train.arguments import TrainingArguments
    from mindpeft.train.callbacks import TrainerState
    from mindpeft.train.runner import StepRunner


def peak_memory_bytes() -> int:
    """The most physical memory that this process has held (``VmHWM``)."""
    try:
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    import psutil

    memory = psutil.Process().memory_info()
    return int(getattr(memory, "peak_wset", memory.rss))


def count_parameters(model: nn.Cell) -> tuple[int, int]:
    """(trainable, all) numbers of parameters; a ``PeftModel`` counts its adapters itself."""
    if hasattr(model, "get_nb_trainable_parameters"):
        return model.get_nb_trainable_parameters()
    parameters = list(model.get_parameters())
    sizes = [(math.prod(parameter.shape), parameter.requires_grad) for parameter in parameters]
    return sum(size for size, trains in sizes if trains), sum(size for size, _ in sizes)


@dataclass
class RunReport:
    """What a run cost and gave; None where there is nothing to tell.

    ``compile_seconds`` and ``median_step_seconds`` are measured by ``CompileClock``; ``best_metric`` is text.
    """

    trainable_parameters: int
    total_parameters: int
    peak_memory_bytes: int
    graphs_compiled: int
    compile_seconds: float
    median_step_seconds: float | None
    samples_per_second: float | None
    best_metric: str | None
    saved_to: str | None

    def metrics(self) -> dict[str, Any]:
        """What ``Trainer.train`` returns of it."""
        return {
            "train_samples_per_second": self.samples_per_second,
            "graphs_compiled": self.graphs_compiled,
            "compile_seconds": self.compile_seconds,
            "median_step_seconds": self.median_step_seconds,
            "peak_memory_bytes": self.peak_memory_bytes,
            "trainable_parameters": self.trainable_parameters,
            "total_parameters": self.total_parameters,
        }

    def rows(self) -> list[tuple[str, str]]:
        """(name, value) as text, without what is None."""
        share = 100 * self.trainable_parameters / max(1, self.total_parameters)
        median, speed = self.median_step_seconds, self.samples_per_second
        pairs = [
            ("trainable parameters", f"{self.trainable_parameters:,} ({share:.2f} %)"),
            ("total parameters", f"{self.total_parameters:,}"),
            ("peak memory", f"{self.peak_memory_bytes / 2**20:,.0f} MiB"),
            ("graphs compiled", str(self.graphs_compiled)),
            ("compile seconds", f"{self.compile_seconds:.1f}"),
            ("median step", None if median is None else f"{median * 1000:,.1f} ms"),
            ("samples/s", None if speed is None else f"{speed:,.1f}"),
            ("best metric", self.best_metric),
            ("saved to", self.saved_to),
        ]
        return [(name, value) for name, value in pairs if value is not None]

    def print(self) -> None:
        """Print the table to standard error."""
        table = Table(box=None, show_header=False, pad_edge=False)
        table.add_column(no_wrap=True)
        table.add_column(overflow="fold")
        for name, value in self.rows():
            table.add_row(name, value)
        err.print(table)


def make_report(
    model: nn.Cell,
    runner: StepRunner,
    state: TrainerState,
    args: TrainingArguments,
    rows: int,
    saved_to: Path | None,
) -> RunReport:
    """The report of a run that is over; ``rows`` is how many it trained on."""
    median = runner.train_clock.median_seconds
    rows_per_call = rows / max(1, runner.train_clock.calls)
    best = None
    if state.best_metric is not None:
        best = f"{args.metric_for_best_model} {state.best_metric:.4f} (step {state.best_step})"
    trainable, total = count_parameters(model)
    return RunReport(
        trainable_parameters=trainable,
        total_parameters=total,
        peak_memory_bytes=peak_memory_bytes(),
        graphs_compiled=runner.graphs,
        compile_seconds=runner.compile_seconds,
        median_step_seconds=None if median is None else median * args.gradient_accumulation_steps,
        samples_per_second=None if median is None else rows_per_call / median,
        best_metric=best,
        saved_to=None if saved_to is None else str(saved_to),
    )
