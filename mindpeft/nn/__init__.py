"""Building blocks of the backbones."""

from mindpeft.nn.embedding import Embedding, lookup_tables
from mindpeft.nn.linear import Conv1D, Linear
from mindpeft.nn.normalization import LayerNorm, RMSNorm, norm_and_sum, norm_of_sum
from mindpeft.nn.parameter import empty_parameter

__all__ = [
    "Conv1D",
    "Embedding",
    "LayerNorm",
    "Linear",
    "RMSNorm",
    "empty_parameter",
    "lookup_tables",
    "norm_and_sum",
    "norm_of_sum",
]
