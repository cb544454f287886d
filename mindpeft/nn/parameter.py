"""How the building blocks create their parameters."""

from __future__ import annotations

import mindspore as ms
from mindspore import Parameter
from mindspore.common.initializer import initializer


def empty_parameter(shape: tuple[int, ...], dtype: ms.Type = ms.float32) -> Parameter:
    """Return a zero parameter that takes no memory until something is written to it.

    The model fills it afterwards, from a checkpoint or by ``PreTrainedModel.init_weights``: drawing random
    numbers for weights that a checkpoint replaces would cost more than loading them. A Parameter made from a
    Tensor would copy it.
    """
    return Parameter(initializer("zeros", shape, dtype))
