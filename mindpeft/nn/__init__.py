"""Building blocks of the backbones."""

from mindpeft.nn.embedding import Embedding
from mindpeft.nn.linear import Linear
from mindpeft.nn.normalization import LayerNorm

__all__ = ["Embedding", "LayerNorm", "Linear"]
