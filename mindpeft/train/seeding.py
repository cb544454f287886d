"""One seed for everything random in a run."""

from __future__ import annotations

import mindspore as ms
from mindspore import nn


def seed_everything(model: nn.Cell, seed: int) -> None:
    """Seed MindSpore, NumPy's global generator, and the random operators that ``model`` holds.

    MindSpore gives an operator such as dropout its seed when it is made; without new seeds a run depends
    on what the process did before. Graphs compiled earlier keep their old ones.
    """
    ms.set_seed(seed)
    number = 0
    for _, cell in model.cells_and_names():
        for value in vars(cell).get("_primitives", {}).values():
            if value is not None and "Seed0" in value.attrs:
                number += 1
                value.add_prim_attr("Seed0", seed % 2**31)
                value.add_prim_attr("Seed1", number)
