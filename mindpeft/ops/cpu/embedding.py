"""Rows of a table."""

from __future__ import annotations

from mindspore import ops

from mindpeft.ops.cpu.library import Kernel, kernel


class EmbeddingKernel(Kernel):
    """Rows of ``weight`` (vocabulary, width), float32 or bfloat16, for ids (...) of int32: (..., width).

    The rows are float32; those of an id that the table does not have are NaN.
    """

    def __init__(self):
        super().__init__()
        backward = kernel("embedding_grad", lambda _, weight, __: weight)

        def gradients(ids, weight, out, dout):
            return ops.zeros_like(ids), backward(ids, weight, dout).astype(weight.dtype)

        self.forward = kernel("embedding", lambda ids, weight: (*ids, weight[1]), gradients=gradients)

    def construct(self, weight, ids):
        return self.forward(ids, weight)
