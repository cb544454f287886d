"""Rows whose columns have a factor each."""

from __future__ import annotations

from mindpeft.ops.cpu.library import Kernel, kernel, must_fit


def _scaled(x: list[int], factors: list[int]) -> list[int]:
    must_fit(x, factors)
    return x


class ScaleColumnsKernel(Kernel):
    """``x * factors``: x (..., columns), factors (columns,), both of float32."""

    def __init__(self):
        super().__init__()
        of_x = kernel("scale_columns", lambda x, _: x)
        of_factors = kernel("scale_columns_grad", lambda x, _: (x[-1],))

        def gradients(x, factors, out, dout):
            return of_x(dout, factors), of_factors(x, dout)

        self.forward = kernel("scale_columns", _scaled, gradients=gradients)

    def construct(self, x, factors):
        return self.forward(x, factors)
