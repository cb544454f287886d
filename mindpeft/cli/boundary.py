"""Where exceptions become one line on standard error and an exit code."""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import typer
from typer.core import TyperCommand

from mindpeft.console import err
from mindpeft.errors import InputError

USER_ERROR, BUG, INTERRUPTED = 2, 1, 130
# What the surroundings refuse, as opposed to what a bug would provoke.
_ENVIRONMENT = {
    errno.EACCES,
    errno.EDQUOT,
    errno.EFBIG,
    errno.EIO,
    errno.ENAMETOOLONG,
    errno.ENOSPC,
    errno.EPERM,
    errno.EROFS,
}


class Command(TyperCommand):
    """A command whose errors are reported; ``mindpeft --debug`` lets them through with their trace."""

    def invoke(self, ctx: Any) -> Any:
        with reported_errors(debug=ctx.find_root().params.get("debug", False)):
            return super().invoke(ctx)


@contextmanager
def reported_errors(debug: bool = False) -> Iterator[None]:
    """Report what the block raises and exit: 2 for a user's mistake, 130 for Ctrl-C, 1 for a bug."""
    try:
        yield
    except typer.Exit:
        raise
    except BrokenPipeError:  # the reader of standard output has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise typer.Exit(0) from None
    except KeyboardInterrupt as interrupt:
        _say(f"interrupted: {interrupt}" if str(interrupt) else "interrupted")
        raise typer.Exit(INTERRUPTED) from None
    except Exception as error:
        if debug:
            raise
        message, code = _describe(error)
        _say(message)
        raise typer.Exit(code) from None


def _describe(error: Exception) -> tuple[str, int]:
    if isinstance(error, InputError):
        return f"error: {error}", USER_ERROR
    if isinstance(error, OSError) and error.errno in _ENVIRONMENT:
        place = f" {error.filename}" if error.filename else ""
        return f"error: can't use{place}: {error.strerror}", USER_ERROR
    first_line = str(error).strip().partition("\n")[0]
    return (
        f"bug in mindpeft: {type(error).__name__}: {first_line} "
        "(run `mindpeft --debug ...` for the trace, and please report it)"
    ), BUG


def _say(message: str) -> None:
    err.print(" ".join(message.splitlines()), markup=False, soft_wrap=True)
