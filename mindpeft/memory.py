"""The process's memory: what the C library keeps of it without need."""

from __future__ import annotations

import ctypes
import functools
import os

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_ARENA_MAX = -1, -3, -8  # of glibc's malloc.h
_LARGE = 4 << 20
_CORES_FOR_A_HEAP = 8


@functools.cache
def _glibc() -> ctypes.CDLL | None:
    """The C library, if it is glibc: others have not all of the functions below."""
    library = ctypes.CDLL(None)
    if not all(hasattr(library, name) for name in ("malloc_trim", "mallopt")):
        return None
    return library


@functools.cache
def tune_heap() -> None:
    """From now on waste less of the heap; does nothing without glibc.

    Buffers of 4 MB and more stay out of it, which they would make grow again: without being told, glibc lets
    ever larger ones into it. Smaller ones, which products need all the time, may find up to 16 MB at its
    end. And a few cores share a heap: each thread of MindSpore's would otherwise get one, with holes of its
    own.
    """
    library = _glibc()
    if library is not None:
        library.mallopt(_M_MMAP_THRESHOLD, _LARGE)
        library.mallopt(_M_TRIM_THRESHOLD, 4 * _LARGE)
        library.mallopt(_M_ARENA_MAX, max(1, (os.cpu_count() or 1) // _CORES_FOR_A_HEAP))


def release_freed_memory() -> None:
    """Give what is free inside the heap back to the system, page by page; does nothing without glibc."""
    tune_heap()
    library = _glibc()
    if library is not None:
        library.malloc_trim(0)
