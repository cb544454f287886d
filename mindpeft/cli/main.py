"""The command line: ``mindpeft COMMAND ...``. Commands import MindSpore only when they run."""

from __future__ import annotations

import os
from typing import Annotated

import typer

from mindpeft.cli.boundary import Command
from mindpeft.cli.chat import chat
from mindpeft.cli.convert import convert
from mindpeft.cli.convert_adapter import convert_adapter
from mindpeft.cli.evaluate import evaluate
from mindpeft.cli.export import export
from mindpeft.cli.generate import generate
from mindpeft.cli.info import info
from mindpeft.cli.init_model import init_model
from mindpeft.cli.lists import methods, models
from mindpeft.cli.merge import merge
from mindpeft.cli.predict import predict
from mindpeft.cli.quickstart import quickstart
from mindpeft.cli.train import train

app = typer.Typer(
    name="mindpeft",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,  # plain help: the same on a terminal and in a pipe
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _show_version(asked: bool) -> None:
    if asked:
        from importlib.metadata import version

        typer.echo(f"mindpeft {version('mindpeft')}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version.")
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show the trace of an error.")] = False,
) -> None:
    """Parameter-efficient fine-tuning of Hugging Face checkpoints in MindSpore.

    \b
    Examples:
      mindpeft quickstart
      mindpeft train recipe.yaml train.learning_rate=1e-3
      mindpeft predict my-run "wait until a socket is ready"
    """


for _command in (
    quickstart,
    train,
    evaluate,
    predict,
    generate,
    chat,
    merge,
    convert,
    convert_adapter,
    export,
    init_model,
    info,
    models,
    methods,
):
    _name = "eval" if _command is evaluate else _command.__name__.replace("_", "-")
    app.command(_name, cls=Command)(_command)


def main(argv: list[str] | None = None) -> None:
    """Run the command line and exit; ``argv`` as in ``sys.argv[1:]``."""
    os.environ.setdefault("GLOG_v", "4")  # what matters in MindSpore's log comes as an exception too
    app(argv)


if __name__ == "__main__":
    main()
