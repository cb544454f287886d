"""``mindpeft merge``: base and adapter become one Hugging Face checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from mindpeft.cli.output import check_output
from mindpeft.console import err, out
from mindpeft.errors import InputError


def merge(
    adapter: Annotated[Path, typer.Argument(help="A run or an adapter folder.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="The folder to make.")],
    base: Annotated[Path | None, typer.Option(help="The base model; default: as the adapter says.")] = None,
    dtype: Annotated[
        str, typer.Option(help="float32, float16, bfloat16, or auto: the base's own.")
    ] = "float32",
    max_shard_size: Annotated[str, typer.Option(help="Split larger checkpoints.")] = "5GB",
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace a folder that isn't empty.")
    ] = False,
) -> None:
    """Add an adapter to its base model's weights and write a checkpoint that transformers opens.

    Configuration (with the label names) and tokenizer come along.

    \b
    Examples:
      mindpeft merge my-run -o merged
      mindpeft merge my-run --base bert-base -o merged --dtype float16
      mindpeft merge my-run -o merged --max-shard-size 2GB --overwrite
    """
    check_output(output, [adapter, base], overwrite)
    from mindpeft.cli.run_folder import open_run
    from mindpeft.convert.writer import parse_size
    from mindpeft.device import setup_device
    from mindpeft.files import atomic_folder
    from mindpeft.peft_model import PeftModel

    parse_size(max_shard_size)
    setup_device("CPU")
    run = open_run(adapter, base, dtype)
    if not isinstance(run.model, PeftModel):
        raise InputError(f"{adapter} is a whole checkpoint: there is no adapter to merge")
    model = run.model.merge_and_unload(safe_merge=True)
    with atomic_folder(output) as folder:
        model.save_pretrained(folder, max_shard_size=max_shard_size)
        try:
            run.tokenizer().save_pretrained(folder)
        except InputError as error:
            err.print(f"warning: no tokenizer written: {error}", markup=False)
    out.print(str(output), markup=False)
