"""Learned gates, one for each row of the batch, that weigh what an adapter contributes.

Mao et al. 2022, "UniPELT: A Unified Framework for Parameter-Efficient Language Model Tuning": the mean over
the tokens of sigmoid(w . x + b), x being what the adapter reads; padding counts too, as in AdapterHub's
`adapters` library.
"""

from __future__ import annotations

import mindspore as ms
from mindspore import ops

from mindpeft.ops.linear import linear


def row_gates(x: ms.Tensor, weight: ms.Tensor, bias: ms.Tensor) -> ms.Tensor:
    """The gates (batch, gates) for x (batch, tokens, features) or (batch, features); runs inside a graph.

    Args:
        x: what the adapter reads.
        weight: (gates, features).
        bias: (gates,).
    """
    gates = ops.sigmoid(linear(x, weight, bias))
    return gates if gates.ndim == 2 else gates.mean(1)


def scale_rows(x: ms.Tensor, factors: ms.Tensor) -> ms.Tensor:
    """``x`` (batch, ...) with each row of the batch multiplied by its factor; factors are (batch, 1)."""
    return x * ops.tile(factors, (1, x.size // x.shape[0])).reshape(x.shape)
