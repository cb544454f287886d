"""Refusing an output folder that would lose something."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from mindpeft.errors import InputError


def check_output(output: Path, sources: Iterable[Path | None], overwrite: bool) -> None:
    """Raise ``InputError`` if ``output`` is or holds a source, is a file, or is not empty."""
    place = output.resolve()
    for source in sources:
        if source is not None and (place == source.resolve() or place in source.resolve().parents):
            raise InputError(f"the output folder {output} is or holds {source}; choose another")
    if output.exists() and not output.is_dir():
        raise InputError(f"the output folder {output} is a file")
    if output.is_dir() and any(output.iterdir()) and not overwrite:
        raise InputError(f"the output folder {output} is not empty: choose another, or use --overwrite")
