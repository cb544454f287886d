"""The process's memory: what the C library keeps of it without need."""

from __future__ import annotations

import ctypes
import functools

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # of glibc's malloc.h
_LARGE = 4 << 20


@functools.cache
def _glibc() -> ctypes.CDLL | None:
    """The C library, if it is glibc: others have not all of the functions below."""
    library = ctypes.CDLL(None)
    if not all(hasattr(library, name) for name in ("malloc_trim", "mallopt")):
        return None
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
