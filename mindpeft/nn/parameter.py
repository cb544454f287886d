"""How the building blocks create their parameters."""

from __future__ import annotations

import mindspore as ms
import numpy as np
from mindspore import Parameter, Tensor


def empty_parameter(shape: tuple[int, ...], dtype: ms.Type = ms.float32) -> Parameter:
    """Return a zero parameter that takes no memory until something is written to it.

    The model fills it afterwards, from a checkpoint or by ``PreTrainedModel.init_weights``: drawing random
    numbers for weights that a checkpoint replaces would cost more than loading them.
    """
    tensor = Tensor.from_numpy(np.zeros(shape, np.float32))
    return Parameter(tensor if dtype == ms.float32 else tensor.astype(dtype))
