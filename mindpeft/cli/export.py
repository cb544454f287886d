"""``mindpeft export``: a model that writes, for MindSpore alone."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from mindpeft.cli.output import check_output
from mindpeft.console import logger, out
from mindpeft.errors import InputError


def export(
    run: Annotated[Path, typer.Argument(help="A run, an adapter, or a checkpoint of a decoder.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="The folder to make.")],
    base: Annotated[Path | None, typer.Option(help="The base model, if it was moved.")] = None,
    rows: Annotated[int, typer.Option(min=1, help="Prompts at once.")] = 1,
    prompt: Annotated[int, typer.Option(min=1, help="Tokens of a prompt at most.")] = 128,
    new_tokens: Annotated[int, typer.Option(min=1, help="Tokens written at most.")] = 128,
    dtype: Annotated[
        str, typer.Option(help="Of the weights: float32, float16, bfloat16, int8, auto.")
    ] = "float32",
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace a folder that isn't empty.")
    ] = False,
) -> None:
    """Write MindIR graphs of a decoder, with a script that runs them without mindpeft.

    Adapters are merged where that is possible; others become part of the graphs.

    \b
    Examples:
      mindpeft export my-run -o exported
      python exported/generate.py "Once upon a time"
    """
    check_output(output, [run, base], overwrite)
    from mindpeft.cli.run_folder import open_run
    from mindpeft.device import setup_device
    from mindpeft.files import atomic_folder
    from mindpeft.generate.export import export_mindir
    from mindpeft.peft_model import PeftModel

    setup_device("CPU")
    opened = open_run(run, base, dtype)
    model = opened.model
    if isinstance(model, PeftModel):
        try:
            model = model.merge_and_unload(safe_merge=True)
        except InputError as error:
            logger.info("the adapter becomes part of the graphs: %s", error)
    tokenizer = opened.tokenizer()
    with atomic_folder(output) as folder:
        tokenizer.save_pretrained(folder)
        export_mindir(model, folder, rows=rows, prompt=prompt, new_tokens=new_tokens)
    out.print(str(output), markup=False)
