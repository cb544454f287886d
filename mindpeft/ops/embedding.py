"""Rows of a table, looked up by number."""

from __future__ import annotations

import mindspore as ms
import mindspore.nn as nn
from mindspore import Tensor, ops

from mindpeft.ops.cpu import kernels_on
from mindpeft.ops.cpu.embedding import EmbeddingKernel
from mindpeft.ops.cpu.linear import WEIGHT_TYPES
from mindpeft.ops.device import on_cpu


class Lookup(nn.Cell):
    """Rows of a table; on the CPU they are float32 where the table is bfloat16, as is all else there."""

    def __init__(self):
        super().__init__()
        self.kernel = EmbeddingKernel() if kernels_on() else None
        self.widens = on_cpu()

    def construct(self, weight: Tensor, ids: Tensor) -> Tensor:
        """
        Args:
            weight: (vocabulary, width).
            ids: (...), integers below vocabulary.

        Returns:
            (..., width).
        """
        if self.kernel is not None and weight.dtype in WEIGHT_TYPES:
            return self.kernel(weight, ids.astype(ms.int32))
        if self.widens and weight.dtype == ms.bfloat16:
            weight = weight.astype(ms.float32)  # MindSpore's Gather takes no bfloat16 there
        return ops.gather(weight, ids, 0)
