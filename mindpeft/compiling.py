"""Compilation of a Cell as a whole: equal layers once, the compiler's memory given back, graphs forgotten."""

from __future__ import annotations

import sys
from typing import Any

from mindspore import nn

from mindpeft.compile_cache import CompileCache
from mindpeft.hidden_parameters import HiddenParameters
from mindpeft.memory import release_freed_memory
from mindpeft.shared_layers import SharedLayers


class CompiledCell(nn.Cell):
    """A Cell whose graph compiles equal layers once, and gives back what the compiler took before it runs.

    MindSpore's compiler makes a hundred small objects for each operator, for a BERT some 200 MB of them, and
    the C library would keep that memory beside the tensors of the steps that follow.
    """

    _compilation: _Compilation | None = None  # while a call may compile

    def compile(self, *args: Any, **kwargs: Any) -> None:
        """Compile for arguments like these, unless that was done before."""
        with HiddenParameters() as hidden, SharedLayers() as sharing, CompileCache() as cache:
            compilation = _Compilation(hidden, sharing, cache, (*args, *sorted(kwargs.items())))
            object.__setattr__(self, "_compilation", compilation)
            try:
                super().compile(*args, **kwargs)
            finally:
                object.__setattr__(self, "_compilation", None)
        if compilation.began:
            release_freed_memory()

    def check_names(self) -> None:
        """What MindSpore does first when it has to compile."""
        super().check_names()
        if self._compilation is not None:
            self._compilation.begin(self)


class _Compilation:
    """What a compilation needs, if there is one."""

    def __init__(
        self, hidden: HiddenParameters, sharing: SharedLayers, cache: CompileCache, arguments: tuple
    ):
        self.hidden, self.sharing, self.cache, self.arguments = hidden, sharing, cache, arguments
        self.began = False

    def begin(self, cell: nn.Cell) -> None:
        """Let MindSpore find the cache, and equal layers if it will not find the graph there."""
        self.began = True
        self.hidden.show(cell)
        if not self.cache.open(cell, self.arguments):
            self.sharing.mark(cell)


def forget_compiled_graphs() -> None:
    """Make every cell and every ``mindspore.jit`` function compile anew at its next call.

    MindSpore's cache key leaves out a cell's structure, its attributes and its parameters' shapes: after a
    change of any it would run the old graph and give wrong results in silence. A change of *values* needs
    none of this.
    """
    # The module that keeps the caches moved between MindSpore's versions; the executor's class moved with it.
    # A lasting reference to the module of Cell would make every cell complain when the interpreter exits.
    executor = sys.modules[nn.Cell.__module__]._cell_graph_executor
    api = sys.modules[type(executor).__module__]
    api.ms_compile_cache.clear()
    for graphs in api.cells_compile_cache.values():
        graphs.clear()
