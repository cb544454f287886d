"""Dropout, and the noise that it and other kernels with a dropout of their own are given."""

from __future__ import annotations

from mindspore import Tensor, ops

from mindpeft.ops.cpu.library import Kernel, kernel, setting
from mindpeft.ops.random import SaltedCell

NO_NOISE = (0.0, 1.0, 0.0, 0.0)


class Noise(SaltedCell):
    """The share to set to zero, what the rest is multiplied by, and two random numbers, others every time.

    One seed gives the same in every run (`mindpeft.ops.dropout.seed_dropout`).
    """

    def __init__(self, p: float):
        super().__init__(random=p > 0.0)
        self.p = p
        self.share, self.silence = setting(p, 1.0 / (1.0 - p) if p < 1.0 else 0.0), setting(*NO_NOISE)
        self.concat = ops.Concat(0)

    def construct(self) -> Tensor:
        if not self.training or self.p == 0.0:
            return self.silence
        return self.concat((self.share, self.normal((2,)) + self.salt))


class DropoutKernel(Kernel):
    """``x`` with some numbers set to zero and the others made larger."""

    def __init__(self):
        super().__init__()
        backward = kernel("dropout", lambda x, _: x)

        def gradients(x, noise, out, dout):
            return backward(dout, noise), ops.zeros_like(noise)

        self.forward = kernel("dropout", lambda x, _: x, gradients=gradients)

    def construct(self, x, noise):
        return self.forward(x, noise)
