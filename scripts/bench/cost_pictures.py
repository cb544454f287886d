"""The pictures of costs.py: step time and peak memory along one axis, of both packages, with the limits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from limits import WIDTH, Point, least_memory, least_traffic, seconds, speed, step_products
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

SIDES = {"ours": ("mindpeft", "tab:blue", "o"), "peer": ("torch + peft", "tab:orange", "s")}
# Axis -> (its label, the words that name a value of it).
AXES = {
    "length": ("length of a text, tokens", "{} tokens"),
    "rows": ("batch, texts", "batch {}"),
    "rank": ("LoRA's rank", "rank {}"),
    "layers": ("layers", "{} layers"),
}

Figures = dict[Point, dict[str, Any]]


def along(axis: str, figures: Figures) -> list[Point]:
    """The points that differ from the plain one in nothing but ``axis``, in its order."""
    return sorted(point for point in figures if point._replace(**{axis: getattr(Point(), axis)}) == Point())


def draw(path: Path, axis: str, figures: Figures, machine: dict[str, Any]) -> None:
    """Write the picture of one axis."""
    points = along(axis, figures)
    figure = Figure(figsize=(10, 5), layout="constrained")
    time, memory = figure.subplots(1, 2)
    _draw_seconds(time, axis, points, figures, machine)
    _draw_memory(memory, axis, points, figures)
    for panel in (time, memory):
        places = [getattr(point, axis) for point in points]
        panel.set_xticks(places, [str(place) for place in places], fontsize=8)
        panel.xaxis.set_minor_locator(NullLocator())
        panel.set_xlabel(AXES[axis][0])
        panel.grid(alpha=0.3)
        panel.legend(fontsize=8, ncols=2, loc="upper center", bbox_to_anchor=(0.5, -0.14))
    fixed = ", ".join(
        words.format(getattr(Point(), name)) for name, (_, words) in AXES.items() if name != axis
    )
    figure.suptitle(f"One LoRA step of a BERT of width {WIDTH}: {fixed}; {machine['name']}", fontsize=11)
    figure.savefig(path, dpi=100)


def _draw_seconds(
    panel: Axes, axis: str, points: list[Point], figures: Figures, machine: dict[str, Any]
) -> None:
    """Logarithmic axes: a straight line's steepness is the power with which time grows."""
    for side, (name, colour, marker) in SIDES.items():
        steps = [seconds(figures[point][side], machine["threads"]) for point in points]
        panel.plot([getattr(point, axis) for point in points], steps, color=colour, marker=marker, label=name)
    places, most = [getattr(point, axis) for point in points], speed(machine)
    products = [step_products(point) / most for point in points]
    panel.plot(places, products, color="black", label=f"limit: products at {most / 1e9:.0f} GFLOP/s")
    traffic = [least_traffic(point) / machine["gbytes"] / 1e9 for point in points]
    panel.plot(places, traffic, "k:", label=f"limit: memory at {machine['gbytes']:.0f} GB/s")
    panel.set_xscale("log", base=2)
    panel.set(title="step: processor time for each thread", ylabel="seconds", yscale="log")
    panel.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    panel.yaxis.set_minor_locator(NullLocator())
    panel.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))


def _draw_memory(panel: Axes, axis: str, points: list[Point], figures: Figures) -> None:
    """Plain axes: a part that doesn't grow is where the line would meet the left edge."""
    places = [getattr(point, axis) for point in points]
    for side, (name, colour, marker) in SIDES.items():
        sides = [figures[point][side] for point in points]
        panel.plot(places, [each["memory"] for each in sides], color=colour, marker=marker, label=name)
        before = [each["memory_before"] for each in sides]
        panel.plot(places, before, color=colour, lw=1, ls="--", label=f"{name}, before the first step")
    least = [least_memory(point) / 1e9 for point in points]
    panel.plot(places, least, color="black", label="limit: weights and what must be kept")
    panel.set(title="peak memory of the process", ylabel="GB", ylim=(0, None))
