"""The end of half a transformer layer: where bottleneck adapters and fusions sit, one around another."""

from __future__ import annotations

from functools import cache
from typing import Any

import mindspore as ms
from mindspore import nn

from mindpeft.errors import InputError
from mindpeft.nn import norm_of_sum
from mindpeft.targets import layer_index
from mindpeft.tuners.base import TunerLayer, linear_features, original

_CHILDREN = {"dense", "dropout", "LayerNorm"}


@cache
def in_layout(kind: type[TunerLayer], layout: Any) -> type[TunerLayer]:
    """The class of the slots for adapters of that layout: the keys that decide what the graph looks like."""
    return type(kind.__name__, (kind,), {"LAYOUT": layout, "__module__": kind.__module__})


def is_place(cell: nn.Cell, path: str) -> bool:
    """Whether a cell ends half a transformer layer with ``LayerNorm(dropout(dense(x)) + residual)``."""
    return cell.name_cells().keys() == _CHILDREN and layer_of(path) is not None


def layer_of(path: str) -> int | None:
    """The index of the transformer layer that a cell is in."""
    return layer_index(path, None)


def follows_attention(path: str) -> bool:
    """Whether such a cell ends the attention half of its layer, rather than the feed-forward half."""
    return path.split(".")[-2:-1] == ["attention"]


def hidden_size(cell: nn.Cell) -> int:
    """The number of features that such a cell gives."""
    return linear_features(original(cell.dense))[1]


def halves(cells: dict[str, nn.Cell]) -> list[str]:
    """The paths of such cells.

    Raises:
        InputError: there are none.
    """
    places = [path for path, cell in cells.items() if is_place(cell, path)]
    if not places:
        raise InputError(
            "bottleneck adapters need layers that end in cells with the children dense, dropout and "
            "LayerNorm, as BERT's do; the model has none"
        )
    return places


class HalfLayer(TunerLayer):
    """A layer around such a cell, called (hidden, residual) like it.

    Several of them nest: each takes what the one inside gives, and the original norm comes once, as the last
    active one wants it.

    Attributes:
        original_ln_before, original_ln_after, is_parallel: as in ``BottleneckConfig``.
        skips: where its own residual starts: at what is "hidden", "added" (with the residual) or "normed".
        acts: whether it does anything by itself; a compile-time constant.
    """

    original_ln_before = original_ln_after = is_parallel = False
    skips = "hidden"
    acts = True

    def __init__(self, base_layer: nn.Cell, path: str, *slot: Any) -> None:
        self.is_first = not isinstance(base_layer, HalfLayer)
        if self.is_first and isinstance(base_layer, TunerLayer):
            raise InputError(f"bottleneck adapters can't go around {type(base_layer).__name__} at {path!r}")
        super().__init__(base_layer, path, *slot)

    def construct(self, hidden: ms.Tensor, residual: ms.Tensor) -> ms.Tensor:
        norm_last = self.norms_last()
        result = self.states(hidden, residual, norm_last)[2]
        return self.original_norm(result, residual) if norm_last else result

    def norms_last(self) -> bool:
        """Whether the original norm ends the computation whichever of the nested layers are active."""
        own = self.original_ln_after or not self.acts
        return own if self.is_first else own and self.base_layer.norms_last()

    def original_norm(self, x: ms.Tensor, residual: ms.Tensor) -> ms.Tensor:
        """The norm of the original cell, of a sum."""
        if self.is_first:
            return norm_of_sum(self.base_layer.LayerNorm, x, residual)
        return self.base_layer.original_norm(x, residual)

    def states(self, x: ms.Tensor, residual: ms.Tensor, norm_last: bool) -> tuple:
        """What this layer and those inside make of a cell's input.

        Returns:
            the original cell's projection; what a further adapter would take; and the result if there is no
            further one, without the original norm if that comes last for all.
        """
        raise NotImplementedError

    def inner_states(self, x: ms.Tensor, residual: ms.Tensor, norm_last: bool) -> tuple:
        """``states`` of what is inside this layer."""
        if not self.is_first:
            return self.base_layer.states(x, residual, norm_last)
        plain = self.base_layer.dropout(self.base_layer.dense(x))
        return plain, plain, plain if norm_last else self.original_norm(plain, residual)

    def entered(self, hidden: ms.Tensor, residual: ms.Tensor) -> tuple[ms.Tensor, ms.Tensor]:
        """What an adapter here reads, and where its own residual starts."""
        if self.is_parallel:
            return residual, residual
        if not self.original_ln_before:
            return hidden, hidden
        normed = self.original_norm(hidden, residual)
        if self.skips == "added":
            return normed, hidden + residual
        return normed, normed if self.skips == "normed" else hidden

    def left(self, adapted: ms.Tensor, plain: ms.Tensor, residual: ms.Tensor, norm_last: bool) -> ms.Tensor:
        """The result if this is the last adapter, without the original norm if that comes last for all."""
        total = adapted + plain if self.is_parallel else adapted
        if self.original_ln_after and not norm_last:
            total = self.original_norm(total, residual)
        return total

    def updates(self, x: ms.Tensor, fusion: str) -> tuple:
        """What the adapters that a fusion mixes make of its input, the innermost first."""
        return self.inner_updates(x, fusion)

    def inner_updates(self, x: ms.Tensor, fusion: str) -> tuple:
        """``updates`` of what is inside this layer."""
        return () if self.is_first else self.base_layer.updates(x, fusion)
