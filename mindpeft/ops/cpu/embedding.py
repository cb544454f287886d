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
        self.forward = kernel("embedding", lambda ids, weight: (*ids, weight[1]))
        self.backward = kernel("embedding_grad", lambda _, weight, __: weight)

    def construct(self, weight, ids):
        return self.forward(ids, weight)

    def bprop(self, weight, ids, out, dout):
        return self.backward(ids, weight, dout).astype(weight.dtype), ops.zeros_like(ids)
