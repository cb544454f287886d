"""The embedding table."""

from __future__ import annotations

import mindspore as ms
import mindspore.nn as nn
from mindspore import Tensor, ops

from mindpeft.nn.parameter import empty_parameter


class Embedding(nn.Cell):
    """Rows of ``weight`` (num_embeddings, embedding_dim), looked up by integer ids."""

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        padding_idx: int | None = None,
        dtype: ms.Type = ms.float32,
    ):
        super().__init__()
        self.num_embeddings = num_embeddings
        self.embedding_dim = embedding_dim
        self.padding_idx = padding_idx
        self.weight = empty_parameter((num_embeddings, embedding_dim), dtype)

    def construct(self, ids: Tensor) -> Tensor:
        return ops.gather(self.weight, ids, 0)
