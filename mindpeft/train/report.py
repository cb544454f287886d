"""The short table that a run ends with."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

from mindspore import nn
from rich.table import Table

from mindpeft.console import err


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
