"""Prefix tuning as AdapterHub's `adapters` library computes it, with gates for UniPELT.

Li and Liang 2021, "Prefix-Tuning"; Mao et al. 2022, "UniPELT". Unlike in Hugging Face PEFT, the real tokens
stay at the positions 0, 1, ..., so one library's prefixes are not the other's. A gate weighs a layer's prefix
for each row of the batch by what that layer's attention reads.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import mindspore as ms
import numpy as np
from mindspore import nn, ops

from mindpeft.config import PeftConfig, PeftType, register_method
from mindpeft.errors import InputError
from mindpeft.tuners.base import Shapes, Site, Tensors, TunerLayer, linear_features, original
from mindpeft.tuners.gates import row_gates, scale_rows
from mindpeft.tuners.prefix_tuning import PrefixAttention, PrefixEncoder, PrefixTuningConfig
from mindpeft.tuners.targeted import check_choice

if TYPE_CHECKING:
    from mindpeft.tuners.base import Slot
    from mindpeft.tuners.plan import BaseModel

GATE_WEIGHT, GATE_BIAS = "prefix_gate.weight", "prefix_gate.bias"


@register_method
@dataclass
class HubPrefixConfig(PrefixTuningConfig):
    """Prefix tuning as in AdapterHub's `adapters`; the other keys are those of ``PrefixTuningConfig``.

    Attributes:
        use_gating: multiply by learned gates.
        shared_gating: one gate for keys and values, rather than one for each.

    Raises:
        InputError: a value is not allowed.
    """

    use_gating: bool = False
    shared_gating: bool = True

    METHOD: ClassVar[PeftType] = PeftType.HUB_PREFIX
    IN_PEFT: ClassVar[bool] = False
    CELL_PREFIX: ClassVar[str] = PeftConfig.CELL_PREFIX
    SHARED_PREFIX: ClassVar[str] = PeftConfig.SHARED_PREFIX

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("use_gating", self.use_gating, (True, False))
        check_choice("shared_gating", self.shared_gating, (True, False))

    def slot_classes(self, base: BaseModel) -> dict[str, type[Slot]]:
        paths = [path for path in super().slot_classes(base) if path]
        classes: dict[str, type[Slot]] = {"": HubPrefixEncoder}
        for path in paths:
            classes[path] = GatedPrefixAttention if self.use_gating else PrefixAttention
            if self.use_gating:
                parent = path.rpartition(".")[0]
                check_attention(base.cells.get(parent), parent)
                classes[parent] = PrefixGate
        return classes


def check_attention(cell: nn.Cell | None, path: str) -> None:
    """Raise ``InputError`` unless a cell hands its second argument on to its attention, as BERT's does."""
    names = [] if cell is None else list(inspect.signature(cell.construct).parameters)
    if names != ["hidden", "mask", "queries"] or "query" not in cell.name_cells():
        raise InputError(
            "use_gating needs attention cells that are called (hidden, mask, queries) and have a child "
            f"query, as BERT's do; {path!r} is none"
        )


class HubPrefixEncoder(PrefixEncoder):
    """Keeps the keys and values of all layers; the tokens' positions stay as they are."""

    def construct(self, *args: Any, **kwargs: Any) -> Any:
        return self.base_layer(*self.arranged(args, kwargs))


class PrefixGate(TunerLayer):
    """Around a layer's attention: hands the gates on together with the mask."""

    def __init__(
        self,
        base_layer: nn.Cell,
        path: str,
        shapes: Shapes,
        dtype: ms.dtype,
        number: int = 0,
        shared: HubPrefixEncoder | None = None,
    ) -> None:
        super().__init__(base_layer, path, shapes, dtype, number)
        object.__setattr__(self, "shared", shared)  # no child: it stands around the model

    @classmethod
    def tensor_shapes(cls, site: Site) -> Shapes:
        gates = 1 if site.config.shared_gating else 2
        return {GATE_WEIGHT: (gates, linear_features(original(site.cell.query))[0]), GATE_BIAS: (gates,)}

    @classmethod
    def initial_tensors(cls, site: Site) -> Tensors:
        shapes = cls.tensor_shapes(site)
        weight = np.random.normal(0.0, 0.02, shapes[GATE_WEIGHT])
        bound = shapes[GATE_WEIGHT][1] ** -0.5  # the library leaves there what torch's Linear has
        bias = np.random.uniform(-bound, bound, shapes[GATE_BIAS])
        return {GATE_WEIGHT: weight.astype(np.float32), GATE_BIAS: bias.astype(np.float32)}

    @classmethod
    def holds(cls, room: Shapes, shapes: Shapes) -> bool:
        return room == shapes

    def construct(
        self, hidden: ms.Tensor, mask: ms.Tensor | None = None, queries: ms.Tensor | None = None
    ) -> ms.Tensor:
        if not self.shared.active:
            return self.base_layer(hidden, mask, queries)
        wide = ops.cast(hidden, self.slot_dtype)
        gates = row_gates(wide, self.prefix_gate.weight, self.prefix_gate.bias)
        return self.base_layer(hidden, (mask, gates), queries)


class GatedPrefixAttention(PrefixAttention):
    """Puts one layer's prefix, weighed by its gates, in front of the keys and values of its attention."""

    GATED = True

    def construct(self, query: ms.Tensor, key: ms.Tensor, value: ms.Tensor, mask: Any = None) -> ms.Tensor:
        if not self.shared.active:
            return self.base_layer(query, key, value, mask)
        keys, values = self.prefixes(key)
        gates = ops.cast(mask[1], keys.dtype)
        keys = scale_rows(keys, gates[:, :1])
        values = scale_rows(values, gates[:, -1:])
        return self.attended(query, key, value, mask[0], keys, values)
