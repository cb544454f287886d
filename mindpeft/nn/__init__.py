"""Building blocks of the backbones."""

from mindpeft.nn.embedding import Embedding
from mindpeft.nn.linear import Linear
from mindpeft.nn.normalization import LayerNorm
from mindpeft.nn.parameter import empty_parameter

__all__ = ["Embedding", "LayerNorm", "Linear", "empty_parameter"]
