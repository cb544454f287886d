"""Random numbers inside a graph."""

from __future__ import annotations

from mindspore import ops


def standard_normal() -> ops.StandardNormal:
    """The operator of random numbers, which on the CPU repeats them for a seed.

    With gradient checkpointing its numbers are kept: drawn again they would be others, and the backward pass
    would not be that of the forward pass.
    """
    operator = ops.StandardNormal()
    operator.add_prim_attr("recompute", False)
    return operator
