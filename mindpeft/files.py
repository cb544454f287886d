"""Writing files and folders so that nobody ever sees half of one."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from mindpeft.errors import InputError


@contextmanager
def atomic_write(path: str | os.PathLike, mode: str = "wb") -> Iterator[IO]:
    """Open a temporary file beside ``path``; it takes the name ``path`` only if the block ends well.

    Args:
        path: the final file name; its folder is made if absent.
        mode: ``"wb"`` or ``"w"`` (UTF-8).

    Raises:
        InputError: the folder can't be written, or the disk is full; nothing is left behind.
    """
    path = Path(path)
    temporary = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor, temporary = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent)
        with os.fdopen(descriptor, mode, encoding=None if "b" in mode else "utf-8") as file:
            os.chmod(temporary, 0o666 & ~_umask())
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        raise InputError(f"can't write {path}: {error.strerror or error}") from error
    finally:
        if temporary is not None and os.path.exists(temporary):
            os.unlink(temporary)


@contextmanager
def atomic_folder(path: str | os.PathLike) -> Iterator[Path]:
    """Yield a temporary folder beside ``path``; it replaces ``path`` only if the block ends well.

    Raises:
        InputError: the place can't be written, or the disk is full; an earlier folder stays as it was.
    """
    path = Path(path)
    temporary = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent))
        os.chmod(temporary, 0o777 & ~_umask())
        yield temporary
        _swap(temporary, path)
    except OSError as error:
        raise InputError(f"can't write {path}: {error.strerror or error}") from error
    finally:
        if temporary is not None:
            shutil.rmtree(temporary, ignore_errors=True)


def _swap(new: Path, place: Path) -> None:
    """Put the folder ``new`` at ``place``; the earlier one is removed only after the new one stands there."""
    if not place.exists():
        os.rename(new, place)
        return
    earlier = Path(tempfile.mkdtemp(prefix=f".{place.name}.", suffix=".old", dir=place.parent))
    os.rename(place, earlier / place.name)
    try:
        os.rename(new, place)
    except OSError:
        os.rename(earlier / place.name, place)
        raise
    finally:
        shutil.rmtree(earlier, ignore_errors=True)


def _umask() -> int:
    """The process's umask, which can only be read by setting it."""
    mask = os.umask(0)
    os.umask(mask)
    return mask


def read_json(path: str | os.PathLike) -> Any:
    """Parse a UTF-8 JSON file.

    Raises:
        InputError: the file is missing, or is not JSON (the message names the line).
    """
    path = Path(path)
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise InputError(f"no such file: {path}") from error
    except json.JSONDecodeError as error:
        raise InputError(f"{path} is not valid JSON: {error.msg} at line {error.lineno}") from error
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"can't read {path}: {error}") from error


def write_json(path: str | os.PathLike, value: Any) -> None:
    """Write ``value`` as JSON: indent 2, keys sorted, UTF-8, whole or not at all."""
    with atomic_write(path, "w") as file:
        json.dump(value, file, indent=2, sort_keys=True, ensure_ascii=False)
        file.write("\n")
