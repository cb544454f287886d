"""``curves.png``: loss, learning rate and metrics over the steps of a run."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from mindpeft.files import atomic_write

CURVES_FILE = "curves.png"
_NO_METRIC = ("eval_loss", "eval_runtime", "eval_samples_per_second", "eval_perplexity")


def save_curves(path: Path, history: list[dict[str, Any]]) -> bool:
    """Draw the lines of a run's log; returns False, and writes nothing, if there is nothing to draw."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure  # without pyplot: no global state, no display

    metrics = sorted({key for line in history for key in line if key.startswith("eval_")} - set(_NO_METRIC))
    panels = [("loss", ["loss", "eval_loss"]), ("learning rate", ["learning_rate"])]
    if metrics:
        panels.append(("metrics", metrics))
    if not any(_series(history, key)[0] for _, keys in panels for key in keys):
        return False
    figure = Figure(figsize=(5 * len(panels), 4), layout="constrained")
    for axes, (title, keys) in zip(figure.subplots(1, len(panels)), panels, strict=True):
        for key in keys:
            steps, values = _series(history, key)
            if steps:
                axes.plot(steps, values, marker="o", markersize=3, label=key.replace("_", " "))
        axes.set(title=title, xlabel="step")
        axes.grid(alpha=0.3)
        axes.legend()
    with atomic_write(path) as file:
        FigureCanvasAgg(figure).print_png(file)
    return True


def _series(history: list[dict[str, Any]], key: str) -> tuple[list[int], list[float]]:
    pairs = [(line["step"], line[key]) for line in history if key in line and math.isfinite(line[key])]
    return [step for step, _ in pairs], [value for _, value in pairs]
