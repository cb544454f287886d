"""C3A, against PEFT with its gradient put right."""

import peft.tuners.c3a.layer
import torch
from peft.tuners.c3a.utils import get_circulant_fast

from tests.parity.case import Case


class TrueGradient:
    """In place of PEFT's convolution, whose ``backward`` passes a wrong gradient on to its input (0.21.2)."""

    @staticmethod
    def apply(x: torch.Tensor, kernel: torch.Tensor) -> torch.Tensor:
        return x @ get_circulant_fast(kernel).T


WRONG = peft.tuners.c3a.layer.BlockCircularConvolution
peft.tuners.c3a.layer.BlockCircularConvolution = TrueGradient

CASES = [
    Case("C3A", "C3AConfig", {"target_modules": ["query", "value", "dense"], "block_size": 8}, rate=5e-2),
]
