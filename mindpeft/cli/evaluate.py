"""``mindpeft eval``: what a run is worth on a file."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table as RichTable

from mindpeft.console import out
from mindpeft.errors import InputError

if TYPE_CHECKING:
    from mindpeft.cli.run_folder import Run
    from mindpeft.data.text_dataset import TextDataset


def evaluate(
    run: Annotated[Path, typer.Argument(help="A run, an adapter, or a merged checkpoint.")],
    data: Annotated[
        Path | None, typer.Option(help="A file with labels; default: the recipe's test or eval file.")
    ] = None,
    base: Annotated[Path | None, typer.Option(help="The base model, if it was moved.")] = None,
    text: Annotated[str | None, typer.Option(help="The column of the text; default: as in training.")] = None,
    text_pair: Annotated[str | None, typer.Option(help="The column of the second text.")] = None,
    label: Annotated[str | None, typer.Option(help="The column of the label.")] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Rows of a batch.")] = 32,
    device: Annotated[str, typer.Option(help="auto, Ascend, GPU or CPU.")] = "auto",
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object instead of a table.")] = False,
) -> None:
    """Measure a trained model on labelled data: loss and the metrics that fit the task.

    A label that training never saw is refused, with its line.

    \b
    Examples:
      mindpeft eval my-run --data test.csv
      mindpeft eval my-run --data test.jsonl --text sentence --label topic --json
      mindpeft eval peft-adapter --base bert-base --data test.csv
    """
    from mindpeft.cli.run_folder import open_run
    from mindpeft.device import setup_device
    from mindpeft.recipe_sections import LANGUAGE_TASKS

    if data is not None and not data.is_file():
        raise InputError(f"no such file: {data}")
    setup_device(device)
    opened = open_run(run, base)
    if opened.task not in LANGUAGE_TASKS:
        opened.require_labels("eval")
    columns = {"text": text, "text_pair": text_pair, "label": label}
    metrics = _measure(opened, _dataset(opened, data, columns), batch_size)
    if as_json:
        out.print(json.dumps(metrics), markup=False, soft_wrap=True)
        return
    table = RichTable(box=None, show_header=False, pad_edge=False)
    for name, value in metrics.items():
        table.add_row(name.replace("_", " "), str(value) if isinstance(value, int) else f"{value:.4f}")
    out.print(table)


def _dataset(run: Run, path: Path | None, columns: dict[str, str | None]) -> TextDataset:
    """The labelled examples: of the file that is asked for, else of the recipe's held-out data."""
    from mindpeft.cli.datasets import load_splits, read_like, to_dataset
    from mindpeft.recipe_sections import DataSection

    if path is None and run.data is not None:
        if run.data.builtin:
            return load_splits(run.data, seed=0).test
        path = run.data.test or run.data.eval
    if path is None:
        raise InputError(f"{run.folder} names no held-out data: give a file with --data")
    section = run.data or DataSection(train=str(path), task=run.task)
    section = replace(section, **{key: value for key, value in columns.items() if value is not None})
    return to_dataset(read_like(path, section), section, labels=run.label_map)


def _measure(run: Run, dataset: TextDataset, batch_size: int) -> dict[str, Any]:
    from mindpeft.cli.datasets import row_length, to_features
    from mindpeft.cli.model_loading import padding_id
    from mindpeft.train.batches import make_batches
    from mindpeft.train.evaluation import evaluate as evaluate_batches
    from mindpeft.train.runner import StepRunner

    tokenizer = run.tokenizer()
    length = row_length(run.data, run.task, run.model.config, tokenizer)
    features = to_features(dataset, tokenizer, length, run.data)
    batches = make_batches(features, batch_size, pad_token_id=padding_id(run.model, tokenizer))
    run.model.set_train(False)
    metrics = evaluate_batches(run.model, StepRunner(run.model), batches).metrics
    return {"rows": len(dataset)} | {name.removeprefix("eval_"): value for name, value in metrics.items()}
