"""One seed for everything random in a run."""

from __future__ import annotations

import mindspore as ms
from mindspore import nn

from mindpeft.ops.dropout import seed_dropout


def seed_everything(model: nn.Cell, seed: int) -> None:
    """Seed MindSpore, NumPy's global generator, and the dropout of ``model``."""
    ms.set_seed(seed)
    seed_dropout(model, seed)
