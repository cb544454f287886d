"""Finds and loads the kernels, and says so when there are none."""

from __future__ import annotations

import ctypes
import functools
import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import mindspore as ms
from mindspore import Tensor, nn, ops

from mindpeft.ops.device import on_cpu

SWITCH = "MINDPEFT_CPU_KERNELS"
THREADS = ("MINDPEFT_NUM_THREADS", "OMP_NUM_THREADS")
# Levels of the build, the best first, and what a processor must have for one (NumPy's names).
LEVELS = {
    "avx512": ("AVX512F", "AVX512CD", "AVX512BW", "AVX512DQ", "AVX512VL"),
    "avx2": ("AVX2", "FMA3", "F16C"),
    "plain": (),
}
# The library's functions that tell what it found, in the order of `Library`'s attributes.
_ABILITIES = (
    *("has_fast_products", "has_fast_bfloat16_products"),
    *("has_matrix_units", "has_fast_int8_products"),
)
_log = logging.getLogger(__name__)


class Library(NamedTuple):
    """The build in use, or why there is none.

    Attributes:
        path: of the shared library; None if there is none.
        level: of the processor, a key of ``LEVELS``.
        products: whether MindSpore's library of matrix products was found, which the kernels call.
        bfloat16: whether it has fast ones of bfloat16 for this processor; else such weights are widened, some
            at a time.
        matrix_units: whether those are made on the processor's matrix units (AMX).
        int8: whether it multiplies 8-bit numbers fast; else such weights are widened too.
        reason: why there is none.
    """

    path: str | None
    level: str = ""
    products: bool = False
    bfloat16: bool = False
    matrix_units: bool = False
    int8: bool = False
    reason: str = ""

    def describe(self) -> str:
        """One line for people."""
        if self.path is None:
            return f"MindSpore's own operators ({self.reason})"
        library = "oneDNN's products" if self.products else "plain products"
        bfloat16 = "bfloat16 (AMX)" if self.matrix_units else "bfloat16"
        fast = [name for name, has in ((bfloat16, self.bfloat16), ("int8", self.int8)) if has]
        return f"mindpeft's kernels for {self.level}, {library} of {', '.join(['float32', *fast])}"


@functools.cache
def library() -> Library:
    """Look for the build that suits this machine, once for a process."""
    off = os.environ.get(SWITCH, "1") == "0"
    found = Library(None, reason=f"{SWITCH}=0") if off else _load()
    if found.path is None:
        _log.warning("CPU kernels are not in use: %s; the same is computed slower", found.reason)
    return found


def kernels_on() -> bool:
    """Whether the device is the CPU and kernels were found."""
    return on_cpu() and library().path is not None


def _load() -> Library:
    features = _processor_features()
    reason = "none were built for this platform when mindpeft was installed, which needs a C++ compiler"
    for level, needed in LEVELS.items():
        path = Path(__file__).parent / f"kernels_{level}.so"
        if not path.is_file() or not all(features.get(name, False) for name in needed):
            continue
        try:
            _load_products()
            loaded = ctypes.CDLL(str(path))
        except OSError as error:
            reason = f"{path.name} can't be loaded: {error}"
            continue
        loaded.use_threads(wanted_threads())
        return Library(str(path), level, *(bool(getattr(loaded, name)()) for name in _ABILITIES))
    return Library(None, reason=reason)


def wanted_threads() -> int:
    """How many threads the environment asks for; 0 if it does not say.

    The library can't ask it: MindSpore sets OMP_NUM_THREADS to 1 behind Python's back.
    """
    values = (os.environ.get(name, "") for name in THREADS)
    return next((int(value) for value in values if value.isdecimal() and int(value) > 0), 0)


def _processor_features() -> dict[str, bool]:
    from numpy.core import _multiarray_umath

    return getattr(_multiarray_umath, "__cpu_features__", {})


def _load_products() -> None:
    """Load the oneDNN that MindSpore brings; the kernels look for it in the process."""
    for name in ("libdnnl.so.3", "libdnnl.so.2", "libdnnl.dylib"):
        path = Path(ms.__file__).parent / "lib" / name
        if path.is_file():
            ctypes.CDLL(str(path), mode=ctypes.RTLD_GLOBAL)
            return


class Kernel(nn.Cell):
    """What all Cells of kernels share; a Cell that chooses holds one as its child, or None."""

    def __deepcopy__(self, memo: dict) -> Kernel:
        """They hold nothing that changes, and MindSpore can't copy operators of this kind."""
        return self

    def keeping_less(self) -> Kernel:
        """The same kernel, which keeps tensors for the backward pass in bfloat16."""
        return self


@contextmanager
def without_kernels(model: nn.Cell) -> Iterator[None]:
    """All of a model's Cells compute by MindSpore's operators: for graphs that leave this process."""
    taken = []
    for _, cell in list(model.cells_and_names()):
        children = cell.name_cells().items()
        taken += [(cell, name, child) for name, child in children if isinstance(child, Kernel)]
    for cell, name, _ in taken:
        setattr(cell, name, None)
    try:
        yield
    finally:
        for cell, name, child in taken:
            setattr(cell, name, child)


def kernel(
    name: str,
    shapes: Callable,
    outputs: int = 1,
    gradients: Callable | None = None,
    kept: int = 0,
    **attributes: int,
) -> ops.Custom:
    """The operator of a kernel; `kernels_on` must hold.

    Args:
        name: as in ``src/``.
        shapes: the inputs' shapes -> the output's, or a tuple of them.
        outputs: how many there are of float32.
        gradients: inputs, outputs and the outputs' gradients -> the gradients of all inputs. It finds its
            operators outside itself: of a Cell's ``bprop``, or of a method, MindSpore does not see that it is
            a backward pass, and `mindspore.recompute` has no effect.
        kept: how many more there are of bfloat16, behind the others.
        attributes: what else the shapes or the gradients depend on. MindSpore takes two operators of one name
            and the same attributes for one, and gives the second the first one's shapes and gradients.
    """
    types = (ms.float32,) * outputs + (ms.bfloat16,) * kept
    types = types if len(types) > 1 else types[0]
    path = f"{library().path}:{name}"
    operator = ops.Custom(path, shapes, lambda *_: types, func_type="aot", bprop=gradients)
    for key, value in {"kept": kept, **attributes}.items():
        operator.add_prim_attr(key, value)
    return operator


def setting(*values: float) -> Tensor:
    """Numbers that a kernel takes as a tensor, since it can take nothing else."""
    return Tensor(values, ms.float32)


def must_fit(rows: list[int], other: list[int]) -> None:
    """Raise ValueError unless the last axes are of one size: else a kernel would read behind a tensor."""
    if rows[-1] != other[-1]:
        raise ValueError(f"rows of {rows[-1]} numbers, of shape {tuple(rows)}, don't fit {tuple(other)}")


def rows_of(shape: list[int]) -> int:
    """How many rows a tensor has whose last axis is a row."""
    rows = 1
    for size in shape[:-1]:
        rows *= size
    return rows
