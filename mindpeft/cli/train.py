"""``mindpeft train``: a recipe becomes an adapter."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from mindpeft.console import out

_HIDDEN = ("runtime", "samples_per_second")


def train(
    recipe: Annotated[Path, typer.Argument(help="A recipe, a YAML file.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Wins over the recipe.")
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an earlier run.")] = False,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the last checkpoint.")] = False,
) -> None:
    """Train an adapter as a recipe says, measure it, and save it in Hugging Face PEFT's format.

    The output folder holds the adapter, tokenizer, labels.json, recipe.yaml (with every value that was used),
    metrics.json, train_log.jsonl, curves.png and the checkpoints. Relative paths are relative to the current
    directory.

    \b
    Examples:
      mindpeft train recipe.yaml
      mindpeft train recipe.yaml train.learning_rate=1e-3 peft.r=16 output_dir=run2
      mindpeft train run2/recipe.yaml --resume
    """
    from mindpeft.cli.pipeline import run_recipe
    from mindpeft.recipe import load_recipe

    print_metrics(run_recipe(load_recipe(recipe, overrides or ()), overwrite=overwrite, resume=resume))


def print_metrics(metrics: dict[str, dict[str, Any]]) -> None:
    """Print what was measured on each held-out part to standard output."""
    table = Table(box=None, show_header=False, pad_edge=False)
    for part in ("eval", "test"):
        for name, value in metrics.get(part, {}).items():
            if not name.endswith(_HIDDEN):
                table.add_row(name.replace("_", " ", 1), f"{value:.4f}")
    out.print(table)
