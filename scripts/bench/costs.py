"""How the cost of a LoRA step grows with length, batch, rank and layers: pictures, numbers, limits.

    python scripts/bench/costs.py              # measure all; into docs/costs.md and docs/costs
    python scripts/bench/costs.py --quick      # fewer and smaller points, into the same files
    python scripts/bench/costs.py --draw       # measure nothing, write them again from figures.json

A BERT of width 384 with a classifier's head, LoRA on query and value, in mindpeft and in torch + peft, each
point and side in a process of its own; the two take turns. Needs the test extra.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

from cost_pictures import AXES, Figures, along, draw
from limits import (
    HEADS,
    INNER,
    POSITIONS,
    SPEEDS,
    WIDTH,
    Point,
    least_memory,
    machine,
    seconds,
    serve_speed,
    speed,
    step_products,
)
from sides import alternate, serve
from tables import ROOT, write_rows
from train_step import SHAPES, Shape, mindpeft_step, torch_step

DOCUMENT, FOLDER = "docs/costs.md", ROOT / "docs" / "costs"
FIGURES = FOLDER / "figures.json"
VALUES = {
    "length": (64, 128, 256, 512, 1024),
    "rows": (1, 4, 8, 32),
    "rank": (2, 8, 32, 128),
    "layers": (2, 4, 6, 12),
}
QUICK = {"length": (64, 128, 256), "rows": (1, 8), "rank": (8, 32), "layers": (2, 6)}
MACHINE_HEAD = "| machine | product, mindpeft, GFLOP/s | product, torch, GFLOP/s | copying, GB/s |"
GROWTH_HEAD = (
    "| along | products | step, mindpeft | step, torch + peft | MB that must be kept | peak, mindpeft, MB "
    "| peak, torch + peft, MB |"
)
HEAD = (
    "| batch x length, rank, layers | mindpeft, s | torch + peft, s | ratio | limit, s "
    "| mindpeft, GB | torch + peft, GB | ratio | limit, GB |"
)
STEP_MAKERS = {"mindpeft": mindpeft_step, "torch": torch_step}


def shape_of(point: Point) -> Shape:
    """What the sides train."""
    return SHAPES["bert-base"]._replace(
        model="bert-384", rows=point.rows, length=point.length, rank=point.rank
    )


def points(values: dict[str, tuple[int, ...]]) -> list[Point]:
    """The plain point, then those that differ from it along one axis."""
    return list(
        dict.fromkeys([Point(), *(Point(**{axis: value}) for axis, some in values.items() for value in some)])
    )


def write_checkpoint(layers: int, folder: Path) -> str:
    """Write a BERT with random weights, unless it is there, and return its folder."""
    import torch
    import transformers

    home = folder / str(layers)
    if not home.exists():
        torch.manual_seed(0)
        config = transformers.BertConfig(
            hidden_size=WIDTH,
            num_attention_heads=HEADS,
            intermediate_size=INNER,
            num_hidden_layers=layers,
            max_position_embeddings=POSITIONS,
        )
        transformers.AutoModelForSequenceClassification.from_config(config).save_pretrained(home)
    return str(home)


def measure(point: Point, scratch: Path, steps: int, threads: int) -> dict[str, Any]:
    """The figures of both sides at one point."""
    common = ["--folder", write_checkpoint(point.layers, scratch), "--point", *map(str, point)]
    commands = [[__file__, "--side", side, *common] for side in STEP_MAKERS]
    return dict(zip(("ours", "peer"), alternate(*commands, steps, threads), strict=True))


def measure_all(values: dict[str, tuple[int, ...]], steps: int, threads: int) -> None:
    """Measure the machine and all points; the file has what there is at any time."""
    FOLDER.mkdir(exist_ok=True)
    found = {"machine": machine(__file__, threads), "points": []}
    with tempfile.TemporaryDirectory() as scratch:
        for point in points(values):
            figures = measure(point, Path(scratch), steps, threads)
            print(row(point, figures, found["machine"]), flush=True)
            found["points"].append({**point._asdict(), **figures})
            FIGURES.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


def read_figures() -> tuple[Figures, dict[str, Any]]:
    """What was measured: the points' figures, the machine's."""
    found = json.loads(FIGURES.read_text(encoding="utf-8"))
    figures = {Point(*(entry[name] for name in Point._fields)): entry for entry in found["points"]}
    return figures, found["machine"]


def name_of(point: Point) -> str:
    return f"{point.rows} x {point.length}, {point.rank}, {point.layers}"


def row(point: Point, figures: dict[str, Any], measured: dict[str, Any]) -> str:
    """A line of the table of all points."""
    ours, peer = figures["ours"], figures["peer"]
    times = [seconds(side, measured["threads"]) for side in (ours, peer)]
    return (
        f"| {name_of(point)} | {times[0]:.3f} | {times[1]:.3f} | {times[0] / times[1]:.2f} "
        f"| {step_products(point) / speed(measured):.3f} "
        f"| {ours['memory']:.2f} | {peer['memory']:.2f} "
        f"| {ours['memory'] / peer['memory']:.2f} | {least_memory(point) / 1e9:.2f} |"
    )


def growth_row(axis: str, figures: Figures) -> str:
    """A line of the table of growth: from the first point of an axis to its last."""
    first, *_, last = along(axis, figures)
    name = f"{AXES[axis][0]}: {getattr(first, axis)} to {getattr(last, axis)}"
    steps = [figures[last][side]["cpu"] / figures[first][side]["cpu"] for side in ("ours", "peer")]
    peaks = [figures[last][side]["memory"] - figures[first][side]["memory"] for side in ("ours", "peer")]
    least = (least_memory(last) - least_memory(first)) / 1e9
    times = " | ".join(f"x {factor:.1f}" for factor in (step_products(last) / step_products(first), *steps))
    memory = " | ".join(f"{1e3 * value:+.0f}" for value in (least, *peaks))
    return f"| {name} | {times} | {memory} |"


def write(figures: Figures, measured: dict[str, Any]) -> None:
    """Write the pictures and the tables."""
    for axis in AXES:
        draw(FOLDER / f"{axis}.png", axis, figures, measured)
    numbers = " | ".join(f"{measured[key]:.0f}" for key in ("our_gflops", "torch_gflops", "gbytes"))
    tables = {
        " machine": (MACHINE_HEAD, {measured["name"]: f"| {measured['name']} | {numbers} |"}),
        " growth": (GROWTH_HEAD, {axis: growth_row(axis, figures) for axis in AXES}),
        "": (HEAD, {name_of(point): row(point, entry, measured) for point, entry in figures.items()}),
    }
    for part, (head, rows) in tables.items():
        write_rows(DOCUMENT, Path(__file__).name + part, head, rows, rows)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--draw", action="store_true")
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--side", choices=[*STEP_MAKERS, *SPEEDS], help=argparse.SUPPRESS)
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    parser.add_argument("--point", type=int, nargs=4, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.side in SPEEDS:
        serve_speed(arguments.side)
    elif arguments.side:
        shape = shape_of(Point(*arguments.point))
        serve(lambda: STEP_MAKERS[arguments.side](arguments.folder, shape))
    else:
        if not arguments.draw:
            measure_all(QUICK if arguments.quick else VALUES, arguments.steps, arguments.threads)
        write(*read_figures())


if __name__ == "__main__":
    main()
