"""``mindpeft quickstart``: from nothing to a trained, saved and answering model in one command."""

from __future__ import annotations

import json
from importlib.resources import files
from pathlib import Path
from typing import Annotated

import typer

from mindpeft.console import err, out

RECIPE = "quickstart.yaml"
QUESTIONS = (
    "wait until a socket is ready for reading",
    "compress a stream of bytes",
    "run several threads at the same time",
    "compute the square root of a number",
    "encode an e-mail message",
)


def quickstart(
    output_dir: Annotated[str, typer.Option(help="The run's folder.")] = "mindpeft-quickstart",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an earlier run.")] = False,
    model: Annotated[str | None, typer.Option(help="A checkpoint folder instead of MiniLM.")] = None,
    epochs: Annotated[float | None, typer.Option(help="Passes over the data.")] = None,
    device: Annotated[str | None, typer.Option(help="auto, Ascend, GPU or CPU.")] = None,
    seed: Annotated[int | None, typer.Option(help="Fixes everything random.")] = None,
) -> None:
    """Fine-tune a pretrained MiniLM with LoRA on embedded data, in a few minutes, with nothing to download.

    It learns to tell which chapter of Python's library reference a sentence belongs to, reports its accuracy
    on held-out sentences, saves the adapter, and answers a few new sentences.

    \b
    Examples:
      mindpeft quickstart
      mindpeft quickstart --output-dir demo --epochs 2
      mindpeft quickstart --model path/to/bert --overwrite
    """
    from mindpeft.cli.answers import Text, answers
    from mindpeft.cli.pipeline import run_recipe
    from mindpeft.cli.run_folder import open_run
    from mindpeft.cli.train import print_metrics
    from mindpeft.recipe import load_recipe

    given = {
        "output_dir": output_dir,
        "model.path": model,
        "train.num_train_epochs": epochs,
        "device": device,
        "seed": seed,
    }
    recipe = load_recipe(
        Path(str(files("mindpeft.cli") / RECIPE)),
        [f"{key}={_quoted(value)}" for key, value in given.items() if value is not None],
    )
    metrics = run_recipe(recipe, overwrite=overwrite)
    print_metrics(metrics)
    out.print()
    for answer in answers(open_run(recipe.output_dir), [Text(question) for question in QUESTIONS]):
        out.print(f"{answer['text']:<45} {answer['label']:<25} {answer['score']:.2f}", markup=False)
    err.print(f'\nAsk it yourself: mindpeft predict {output_dir} "your sentence"', markup=False)


def _quoted(value: str | float) -> str:
    """A value that YAML reads back as it is."""
    return json.dumps(value)
