"""``mindpeft convert``: a checkpoint in any readable format becomes a safetensors folder."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

from mindpeft.console import err, out

if TYPE_CHECKING:
    from mindpeft.convert.writer import Progress as ProgressFunction


def convert(
    src: Annotated[Path, typer.Argument(help="A checkpoint folder or file.")],
    dst: Annotated[Path, typer.Argument(help="The folder to make.")],
    dtype: Annotated[str | None, typer.Option(help="float32, float16, bfloat16; default: keep.")] = None,
    max_shard_size: Annotated[str, typer.Option(help="Split larger checkpoints.")] = "5GB",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace DST if it isn't empty.")] = False,
) -> None:
    """Write a checkpoint again as safetensors, one tensor at a time.

    SRC is safetensors, pytorch_model.bin (read without running its pickles), shards with an index, or a
    MindSpore .ckpt. Configuration and tokenizer come along.

    \b
    Examples:
      mindpeft convert bert-base bert-base-safetensors
      mindpeft convert pytorch_model.bin out --dtype bfloat16
      mindpeft convert big sharded --max-shard-size 2GB --overwrite
    """
    from mindpeft.convert.writer import convert_checkpoint

    with _progress_bar() as progress:
        written = convert_checkpoint(
            src, dst, dtype=dtype, max_shard_size=max_shard_size, overwrite=overwrite, progress=progress
        )
    for path in written:
        out.print(str(path), markup=False)


@contextmanager
def _progress_bar() -> Iterator[ProgressFunction]:
    """A bar of bytes written, on a terminal only."""
    columns = (TextColumn("convert"), BarColumn(), DownloadColumn(), TimeRemainingColumn())
    with Progress(*columns, console=err, transient=True, disable=not err.is_terminal) as bar:
        task = bar.add_task("convert", total=None)
        yield lambda name, done, total: bar.update(task, completed=done, total=total)
