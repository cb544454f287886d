"""Rows whose columns have a factor each."""

from __future__ import annotations

from mindpeft.ops.cpu.library import Kernel, kernel


class ScaleColumnsKernel(Kernel):
    """``x * factors``: x (..., columns), factors (columns,), both of float32."""

    def __init__(self):
        super().__init__()
        self.forward = kernel("scale_columns", lambda x, _: x)
        self.backward_factors = kernel("scale_columns_grad", lambda x, _: (x[-1],))

    def construct(self, x, factors):
        return self.forward(x, factors)

    def bprop(self, x, factors, out, dout):
        return self.forward(dout, factors), self.backward_factors(x, dout)
