"""Operators for the CPU in C++, where MindSpore's own are slow, keep their buffers, or are missing.

`src/` is built by setup.py, once for each level of the processor's vector units; `library` finds the build
that this machine can run. Each of the other files wraps the kernels of one source file as Cells with
gradients; the files one level up choose between them and compositions of MindSpore's operators with the same
results.
"""

from mindpeft.ops.cpu.library import kernels_on

__all__ = ["kernels_on"]
