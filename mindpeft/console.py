"""What the program says: results to standard output, everything else to standard error, plain in a pipe."""

from __future__ import annotations

import logging

from rich.console import Console

out = Console(highlight=False, soft_wrap=True)
err = Console(stderr=True, highlight=False)
logger = logging.getLogger("mindpeft")


class _ConsoleHandler(logging.Handler):
    """One plain line a record; rich keeps it clear of a running progress bar."""

    def emit(self, record: logging.LogRecord) -> None:
        text = self.format(record)
        if record.levelno >= logging.WARNING:
            text = f"{record.levelname.lower()}: {text}"
        err.print(text, markup=False, soft_wrap=True)


def set_verbosity(level: int | str) -> None:
    """Set the least level of messages shown, e.g. ``logging.WARNING`` or ``"DEBUG"``."""
    logger.setLevel(level)


if not logger.handlers:
    logger.addHandler(_ConsoleHandler())
    logger.setLevel(logging.INFO)
    logger.propagate = False
