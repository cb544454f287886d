"""The product with a Kronecker product of two small matrices."""

from __future__ import annotations

import mindspore as ms
import mindspore.nn as nn
from mindspore import Tensor, ops

from mindpeft.ops.cpu import kernels_on
from mindpeft.ops.cpu.kron import KronKernel
from mindpeft.ops.linear import linear

_batch_matmul = ops.BatchMatMul()
_tile = ops.Tile()


def kron_linear(x: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """Return ``x @ kron(left, right).T``, that is left X right^T for each row of x laid out as X (m, n).

    Args:
        x: (..., m n).
        left: (p, m).
        right: (k, n).

    Returns:
        Tensor of shape (..., p k).
    """
    (p, m), tokens = left.shape, x.size // x.shape[-1]
    rows = linear(x.reshape((tokens * m, x.shape[-1] // m)), right).reshape((tokens, m, right.shape[0]))
    rows = _batch_matmul(_tile(left.reshape((1, p, m)), (tokens, 1, 1)), rows)
    return rows.reshape((*x.shape[:-1], p * right.shape[0]))


class KronProduct(nn.Cell):
    """`kron_linear` as a Cell, which takes the device's own operator."""

    def __init__(self):
        super().__init__()
        self.kernel = KronKernel() if kernels_on() else None

    def construct(self, x: Tensor, left: Tensor, right: Tensor) -> Tensor:
        """The arguments are those of `kron_linear`, of one dtype."""
        if self.kernel is None or x.dtype != ms.float32:
            return kron_linear(x, left, right)
        return self.kernel(x, left, right)
