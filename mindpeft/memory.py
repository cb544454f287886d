"""The process's memory: what the C library keeps of it."""

from __future__ import annotations

import ctypes
import functools

from mindspore import nn

_M_MMAP_THRESHOLD = -3  # of glibc's malloc.h
_LARGE = 1 << 20


@functools.cache
def _glibc() -> ctypes.CDLL | None:
    """The C library, if it is glibc: others have neither of the functions below."""
    library = ctypes.CDLL(None)
    return library if hasattr(library, "malloc_trim") and hasattr(library, "mallopt") else None


def release_freed_memory() -> None:
    """Give what is free inside the heap back to the system, page by page; does nothing without glibc.

    From then on buffers of 1 MB and more stay out of the heap, which they would make grow again: without
    being told, glibc lets ever larger ones into it.
    """
    library = _glibc()
    if library is not None:
        library.mallopt(_M_MMAP_THRESHOLD, _LARGE)
        library.malloc_trim(0)


class CompiledCell(nn.Cell):
    """A Cell that is compiled as a whole: what the compiler freed is given back before the graph runs.

    MindSpore's compiler makes a hundred small objects for each operator, for a BERT some 200 MB of them, and
    the C library would keep that memory beside the tensors of the steps that follow.
    """

    def compile(self, *args, **kwargs) -> None:
        """Compile for arguments like these, unless that was done before."""
        graphs = len(self.compile_cache)
        super().compile(*args, **kwargs)
        if len(self.compile_cache) > graphs:
            release_freed_memory()
