"""``mindpeft predict``: texts in, JSON lines out."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mindpeft.errors import InputError

if TYPE_CHECKING:
    from mindpeft.cli.answers import Text
    from mindpeft.cli.run_folder import Run


def predict(
    run: Annotated[Path, typer.Argument(help="A run, an adapter, or a merged checkpoint.")],
    texts: Annotated[list[str] | None, typer.Argument(metavar="[TEXT]...", help="What to ask about.")] = None,
    file: Annotated[
        Path | None, typer.Option("--file", "-f", help=".txt: a text a line; or CSV, TSV, JSON, JSONL.")
    ] = None,
    pair: Annotated[str | None, typer.Option(help="The second text, for tasks with two.")] = None,
    base: Annotated[Path | None, typer.Option(help="The base model, if it was moved.")] = None,
    top_k: Annotated[int | None, typer.Option(min=1, help="Also show that many scores.")] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Rows of a batch.")] = 32,
    device: Annotated[str, typer.Option(help="auto, Ascend, GPU or CPU.")] = "auto",
) -> None:
    """Answer texts with labels and scores, one JSON object a line.

    The texts come from the arguments, from a file, or from standard input (a text a line). A table's columns
    are those that training used.

    \b
    Examples:
      mindpeft predict my-run "wait until a socket is ready for reading"
      mindpeft predict my-run --file questions.csv --top-k 3 > answers.jsonl
      cat questions.txt | mindpeft predict my-run
    """
    if texts and file is not None:
        raise InputError("give texts or --file, not both")
    if not texts and file is None and sys.stdin.isatty():
        raise InputError("nothing to predict: give texts, --file FILE, or lines on standard input")
    from mindpeft.cli.answers import answers
    from mindpeft.cli.run_folder import open_run
    from mindpeft.device import setup_device

    if file is not None and not file.is_file():
        raise InputError(f"no such file: {file}")
    setup_device(device)
    opened = open_run(run, base)
    opened.require_labels("predict")
    asked = (
        _from_file(opened, file, pair) if file is not None else _from_lines(opened, texts or _lines(), pair)
    )
    for answer in answers(opened, asked, batch_size=batch_size, top_k=top_k):
        sys.stdout.write(json.dumps(answer, ensure_ascii=False) + "\n")
    sys.stdout.flush()


def _lines() -> Iterator[str]:
    """Standard input as UTF-8 lines, blank ones left out."""
    for number, line in enumerate(sys.stdin.buffer, 1):
        try:
            text = line.decode("utf-8").rstrip("\r\n")
        except UnicodeDecodeError as error:
            raise InputError(f"standard input, line {number}: not UTF-8") from error
        if text.strip():
            yield text


def _from_lines(run: Run, lines: Iterable[str], pair: str | None) -> Iterator[Text]:
    from mindpeft.cli.answers import Text

    takes_pair = run.data is not None and run.data.text_pair is not None
    if takes_pair and pair is None:
        raise InputError(f"{run.folder} was trained on pairs: give the second text with --pair, or a --file")
    if pair is not None and run.data is not None and not takes_pair:
        raise InputError(f"{run.folder} was trained on single texts: leave out --pair")
    for line in lines:
        if not line.strip():
            raise InputError("a text is empty")
        words = run.task == "token_classification"
        yield Text([word for word in line.split(" ") if word] if words else line, pair)


def _from_file(run: Run, file: Path, pair: str | None) -> Iterable[Text]:
    from mindpeft.cli.answers import Text
    from mindpeft.cli.datasets import read_like, to_dataset
    from mindpeft.recipe_sections import DataSection

    data = run.data or DataSection(train=str(file), task=run.task)
    table = read_like(file, data)
    if table.columns == ("text",) and file.suffix.lower() == ".txt":
        return _from_lines(run, [row.values["text"] for row in table.rows], pair)
    examples = to_dataset(table, data, labels=None, with_labels=False).examples
    return [Text(example.text, example.text_pair) for example in examples]
