"""One seed for everything random in a run."""

from __future__ import annotations

import mindspore as ms
from mindspore import nn


def seed_everything(model: nn.Cell, seed: int) -> int:
    """Seed MindSpore, NumPy's global generator, and the random operators that ``model`` holds.

    MindSpore gives an operator such as dropout its seed when it is made; without new seeds a run depends on
    what the process did before. Graphs compiled earlier keep their old ones.

    On the CPU that is not enough for dropout: measured on MindSpore 2.7.0 and 2.10.0, the masks of one seed
    differ between runs from about the operator's sixth call on (probably threads are tuned by timing).

    Returns:
        The number of operators in use that draw random numbers.
    """
    ms.set_seed(seed)
    number = 0
    for _, cell in model.cells_and_names():
        for operator in vars(cell).get("_primitives", {}).values():
            if operator is not None and "Seed0" in operator.attrs:
                number += operator.attrs.get("keep_prob", 0.0) < 1.0
                operator.add_prim_attr("Seed0", seed % 2**31)
                operator.add_prim_attr("Seed1", number)
    return number
