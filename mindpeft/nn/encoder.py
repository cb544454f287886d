"""The stack of an encoder's layers, whose last one may be computed for the first token alone."""

from __future__ import annotations

from collections.abc import Iterable

import mindspore.nn as nn
from mindspore import Tensor

from mindpeft.nn.checkpointing import CheckpointingStack
from mindpeft.nn.hooks import is_listened_to


class EncoderStack(CheckpointingStack):
    """Layers that are called (hidden, mask, queries).

    Where ``queries`` is a tensor, a layer computes what these tokens become, which see all of ``hidden``.
    """

    def __init__(self, layers: Iterable[nn.Cell]):
        super().__init__()
        self.layer = nn.CellList(list(layers))

    def construct(self, hidden: Tensor, mask: Tensor | None = None, first_only: bool = False):
        """Return the hidden states before the first layer and after each.

        Args:
            hidden: (batch, length, width).
            mask: what ``Attention`` takes.
            first_only: a constant of the graph: no more than the first token is wanted of the last states.
                They may be (batch, 1, width) then.
        """
        narrow = first_only and self.can_narrow
        states = (hidden,)
        for i, layer in enumerate(self.layer):
            if narrow and i == len(self.layer) - 1:
                hidden = self.called(layer, hidden, mask_of_first(mask), hidden[:, :1])
            else:
                hidden = self.called(layer, hidden, mask)
            states = (*states, hidden)
        return states

    def set_last_apart(self) -> None:
        """Compile the last layer by itself, for calls with ``first_only``.

        Of a graph that layers share, MindSpore mixes up calls with different numbers of arguments.
        """
        if len(self.layer) > 0:
            self.layer[-1].is_apart = True  # which makes its structure differ

    @property
    def can_narrow(self) -> bool:
        """Whether no cell of the last layer ``mixes_tokens`` of its input, and no hook sees its calls."""
        if len(self.layer) == 0:
            return False
        cells = [cell for _, cell in self.layer[-1].cells_and_names()]
        return not any(getattr(cell, "mixes_tokens", False) or is_listened_to(cell) for cell in cells)


def mask_of_first(mask: Tensor | None) -> Tensor | None:
    """A mask of ``Attention`` for the first query; runs inside a graph."""
    if mask is None or mask.ndim == 2 or mask.shape[2] == 1:
        return mask
    return mask[:, :, :1]
