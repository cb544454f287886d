"""The dense product."""

from __future__ import annotations

from mindspore import Tensor, ops

_matmul = ops.MatMul(transpose_b=True)
_bias_add = ops.BiasAdd()


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Return ``x @ weight.T + bias``.

    Args:
        x: (..., in).
        weight: (out, in), as in PyTorch.
        bias: (out,) or None.

    Returns:
        Tensor of shape (..., out).
    """
    # Rows are folded into one axis: BiasAdd wants (N, C), and a plain `+` would broadcast, which on the CPU
    # keeps four times the size of its output for the life of the graph.
    rows = _matmul(x.reshape((-1, x.shape[-1])), weight)
    if bias is not None:
        rows = _bias_add(rows, bias)
    return rows.reshape((*x.shape[:-1], weight.shape[0]))
