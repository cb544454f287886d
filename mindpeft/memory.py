"""The process's memory: what the C library and the system keep of it without need."""

from __future__ import annotations

import ctypes
import functools
import re
from collections.abc import Iterator
from pathlib import Path

from mindspore import nn

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # of glibc's malloc.h
_LARGE = 4 << 20
_MADV_DONTNEED = 4  # of Linux
_MAPS = Path("/proc/self/smaps")
_MAP = re.compile(r"([0-9a-f]+)-([0-9a-f]+) r-.p \S+ \S+ \d+ +\S+\.so[.\d]*$")


@functools.cache
def _glibc() -> ctypes.CDLL | None:
    """The C library, if it is glibc: others have not all of the functions below."""
    library = ctypes.CDLL(None)
    if not all(hasattr(library, name) for name in ("malloc_trim", "mallopt", "madvise")):
        return None
    library.madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    return library


def release_freed_memory() -> None:
    """Give what is free inside the heap back to the system, page by page; does nothing without glibc.

    From then on buffers of 4 MB and more stay out of the heap, which they would make grow again: without
    being told, glibc lets ever larger ones into it. Smaller ones, which products need all the time, may
    find up to 16 MB at the heap's end.
    """
    library = _glibc()
    if library is not None:
        library.mallopt(_M_MMAP_THRESHOLD, _LARGE)
        library.mallopt(_M_TRIM_THRESHOLD, 4 * _LARGE)
        library.malloc_trim(0)


def _unwritten_parts(lines: Iterator[str]) -> Iterator[tuple[int, int]]:
    """Begin and size of what is mapped from shared libraries' files and is as it is in the file."""
    found = None
    for line in lines:
        if "-" in line.partition(" ")[0]:
            found = _MAP.match(line)
        elif found and line.startswith("Anonymous:") and int(line.split()[1]) == 0:
            begin, end = (int(number, 16) for number in found.groups())
            yield begin, end - begin


def release_code() -> None:
    """Take the pages of shared libraries' files out of this process; those it needs come back by themselves.

    Importing MindSpore and compiling read 260 MB of its code and tables, of which a step of training needs
    30. They stay in the system's file cache, which other processes share and which gives way to other needs.
    """
    library = _glibc()
    if library is None or not _MAPS.exists():
        return
    with _MAPS.open(encoding="utf-8") as maps:
        parts = list(_unwritten_parts(iter(maps)))
    for begin, size in parts:
        library.madvise(begin, size, _MADV_DONTNEED)


class CompiledCell(nn.Cell):
    """A Cell that is compiled as a whole: what only the compiler needed is given back before the graph runs.

    MindSpore's compiler makes a hundred small objects for each operator, for a BERT some 200 MB of them, and
    the C library would keep that memory beside the tensors of the steps that follow.
    """

    def compile(self, *args, **kwargs) -> None:
        """Compile for arguments like these, unless that was done before."""
        graphs = len(self.compile_cache)
        super().compile(*args, **kwargs)
        if len(self.compile_cache) > graphs:
            release_freed_memory()
            release_code()
