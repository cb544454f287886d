"""Products with a Kronecker product, which is never made."""

from __future__ import annotations

from mindpeft.ops.cpu.library import Kernel, kernel, must_fit


def _product_shape(x: list[int], left: list[int], right: list[int]) -> tuple[int, ...]:
    must_fit(x, [left[1] * right[1]])
    return (*x[:-1], left[0] * right[0])


class KronKernel(Kernel):
    """``x @ kron(left, right).T``: x (..., m n), left (p, m), right (k, n), all of float32."""

    def __init__(self):
        super().__init__()
        of_x = kernel("kron_linear_grad", lambda dy, left, right: (*dy[:-1], left[1] * right[1]))
        of_pair = kernel("kron_linear_grad_pair", lambda x, left, right, dy: (left, right), 2)

        def gradients(x, left, right, out, dout):
            return (of_x(dout, left, right), *of_pair(x, left, right, dout))

        self.forward = kernel("kron_linear", _product_shape, gradients=gradients)

    def construct(self, x, left, right):
        return self.forward(x, left, right)
