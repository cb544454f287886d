"""Gradient checkpointing (Chen et al., 2016): for the backward pass a layer keeps nothing but its input."""

from __future__ import annotations

from typing import Any

import mindspore as ms
import mindspore.nn as nn
from mindspore import ops

from mindpeft.compiling import forget_compiled_graphs
from mindpeft.console import logger
from mindpeft.errors import InputError


class CheckpointingStack(nn.Cell):
    """A stack whose layers can be computed a second time in the backward pass.

    Attributes:
        checkpointing: whether they are, in training; set by `set_checkpointing`.
    """

    def __init__(self, *arguments: Any):
        super().__init__(*arguments)
        self.checkpointing = False

    def called(self, layer: nn.Cell, *arguments: Any) -> Any:
        """What a layer gives; runs inside a graph."""
        if self.checkpointing and self.training and _in_graph_mode():
            return ms.recompute(layer, *arguments)
        return layer(*arguments)


@ops.constexpr
def _in_graph_mode() -> bool:
    """Elsewhere a layer would be computed again with other random numbers."""
    return ms.get_context("mode") == ms.GRAPH_MODE


def set_checkpointing(model: nn.Cell, on: bool) -> None:
    """Let a model's layers be computed again in the backward pass, or keep what it needs of them.

    In PyNative mode it has no effect, and a warning says so.

    Raises:
        InputError: the model has no such layers.
    """
    stacks = stacks_of(model)
    if not stacks:
        raise InputError(f"{type(model).__name__} has no layers for gradient checkpointing")
    if on and ms.get_context("mode") != ms.GRAPH_MODE:
        logger.warning("gradient checkpointing has no effect in PyNative mode")
    if any(stack.checkpointing != on for stack in stacks):
        for stack in stacks:
            stack.checkpointing = on
        forget_compiled_graphs()


def is_checkpointing(model: nn.Cell) -> bool:
    """Whether a model's layers are computed again in the backward pass."""
    return any(stack.checkpointing for stack in stacks_of(model))


def stacks_of(model: nn.Cell) -> list[CheckpointingStack]:
    """The stacks of layers in a model."""
    return [cell for _, cell in model.cells_and_names() if isinstance(cell, CheckpointingStack)]
