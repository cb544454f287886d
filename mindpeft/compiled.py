"""MindSpore's caches of compiled graphs."""

from __future__ import annotations

import sys

from mindspore import nn


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
