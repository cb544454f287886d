"""Compiled graphs kept on the disk, each in a folder that is named by all it depends on.

MindSpore's own cache goes by the order in which graphs are compiled and by the sources that it knows of: with
another scale, width or batch it gives a wrong graph in silence. Here its folder is another one whenever
anything is else: structure of the Cell, arguments, sources, kernels, versions, device.
"""

from __future__ import annotations

import functools
import hashlib
import os
import platform
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import mindspore as ms
from mindspore import Tensor, nn

from mindpeft.console import logger
from mindpeft.ops.cpu.library import library
from mindpeft.structure import lasting_structure

SWITCH = "MINDPEFT_COMPILE_CACHE"
_ROOT = Path(__file__).parent


class CompileCache:
    """MindSpore's cache in the right folder, from `open` to the end of a ``with`` block."""

    def __init__(self) -> None:
        self._before: dict[str, str | None] = {}

    def __enter__(self) -> CompileCache:
        return self

    def __exit__(self, *_: object) -> None:
        for name, value in self._before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value

    def open(self, cell: nn.Cell, arguments: Sequence[Any]) -> bool:
        """Let what is compiled next be read from the cache or written to it; does nothing if it is not on.

        Returns:
            whether the graph is there.
        """
        folder = os.environ.get(SWITCH)
        if not folder:
            return False
        key = graph_key(cell, arguments)
        if key is None:
            logger.info("the graph of %s is not kept: it holds values of unknown kinds", type(cell).__name__)
            return False
        place = Path(folder).expanduser().resolve() / key
        settings = {"MS_COMPILER_CACHE_ENABLE": "1", "MS_COMPILER_CACHE_PATH": str(place)}
        self._before = {name: os.environ.get(name) for name in settings}
        os.environ.update(settings)
        return place.is_dir()


def graph_key(cell: nn.Cell, arguments: Sequence[Any]) -> str | None:
    """A name for the graph that a Cell compiles to; None if not all is known that it depends on."""
    structure = lasting_structure(cell)
    if structure is None:
        return None
    shapes = [_described(value) for value in arguments]
    parts = (structure, shapes, cell.phase, _sources(), _surroundings())
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:40]


def _described(value: Any) -> Any:
    return (tuple(value.shape), str(value.dtype)) if isinstance(value, Tensor) else repr(value)


def _surroundings() -> tuple:
    mode = ms.get_context("mode"), ms.get_context("device_target"), ms.get_context("deterministic")
    return ms.__version__, platform.python_version(), platform.machine(), mode, library().path


@functools.cache
def _sources() -> str:
    """A digest of mindpeft's code and of the kernels in use."""
    digest = hashlib.sha256()
    files = [*sorted(_ROOT.rglob("*.py")), *sorted(_models().rglob("*.py"))]
    for path in files + ([Path(library().path)] if library().path else []):
        digest.update(path.read_bytes())
    return digest.hexdigest()


def _models() -> Path:
    from mindpeft import models

    return Path(models.__file__).parent
