"""LoRA with a gate for each row of the batch, as in UniPELT: y = W x + g(x) B A x.

Mao et al. 2022, computed as AdapterHub's `adapters` library does with ``use_gating``: the gate is there in
place of the scaling alpha / r. Hugging Face PEFT has no such LoRA, so the method has a name of its own.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

import mindspore as ms
import numpy as np
from mindspore import nn, ops

from mindpeft.config import PeftType, register_method
from mindpeft.errors import InputError
from mindpeft.tuners.base import Shapes, Site, Tensors, check_linear, linear_features
from mindpeft.tuners.gates import row_gates, scale_rows
from mindpeft.tuners.lora_layers import LoraLinear
from mindpeft.tuners.targeted import TargetedConfig, check_choice, check_count, check_rate

GATE_WEIGHT, GATE_BIAS = "lora_gate.weight", "lora_gate.bias"


@register_method
@dataclass
class GatedLoraConfig(TargetedConfig):
    """LoRA with gates; keys are those of ``LoraConfig`` of the same name.

    Attributes:
        r: the rank.
        exclude_modules: cells never targeted.
        lora_dropout: dropout on the input of A while training.
        fan_in_fan_out: the weights are (in, out); set from the cells themselves.
        init_lora_weights: ``True`` (B zero) or ``False`` (both random).
        layers_to_transform: only these layer indices; needs a list of targets.
        layers_pattern: the name before the layer index.
        rank_pattern: cells, or regular expressions for their names, with a rank of their own.

    Raises:
        InputError: a value is not allowed.
    """

    r: int = 8
    exclude_modules: list[str] | str | None = None
    lora_dropout: float = 0.0
    fan_in_fan_out: bool = False
    init_lora_weights: bool = True
    layers_to_transform: list[int] | int | None = None
    layers_pattern: list[str] | str | None = None
    rank_pattern: dict = field(default_factory=dict)

    METHOD: ClassVar[PeftType] = PeftType.GATED_LORA
    IN_PEFT: ClassVar[bool] = False
    lora_bias: ClassVar[bool] = False  # what LoRA's layers ask for besides

    def __post_init__(self) -> None:
        super().__post_init__()
        self.rank_pattern = dict(self.rank_pattern or {})
        for key, rank in {"r": self.r, **self.rank_pattern}.items():
            check_count(key if key == "r" else f"rank_pattern[{key!r}]", rank)
        check_rate("lora_dropout", self.lora_dropout)
        check_choice("init_lora_weights", self.init_lora_weights, (True, False))

    def slot_class(self, cell: nn.Cell, path: str) -> type[GatedLoraLinear]:
        check_linear(cell, path, "GATED_LORA")
        return GatedLoraLinear


class GatedLoraLinear(LoraLinear):
    """LoRA on a linear cell, A (r, in), B (out, r), with a gate (1, in)."""

    mixes_tokens = True

    @classmethod
    def scaling_of(cls, site: Site) -> float:
        return 1.0

    @classmethod
    def tensor_shapes(cls, site: Site) -> Shapes:
        gate = {GATE_WEIGHT: (1, linear_features(site.cell)[0]), GATE_BIAS: (1,)}
        return super().tensor_shapes(site) | gate

    @classmethod
    def initial_tensors(cls, site: Site) -> Tensors:
        shape = cls.tensor_shapes(site)[GATE_WEIGHT]
        gate = {GATE_WEIGHT: np.random.normal(0.0, 0.02, shape), GATE_BIAS: np.zeros(1)}
        return super().initial_tensors(site) | {key: value.astype(np.float32) for key, value in gate.items()}

    @classmethod
    def check_merge(cls, site: Site) -> None:
        raise InputError("GATED_LORA can't be merged into the base model's weights: its gates read the input")

    def construct(self, x: ms.Tensor) -> Any:
        result = self.base_layer(x)
        wide = ops.cast(x, self.slot_dtype)
        gates = row_gates(wide, self.lora_gate.weight, self.lora_gate.bias)
        update = scale_rows(self.update(self.dropout(wide)), gates)
        return ops.cast(ops.cast(result, self.slot_dtype) + update, result.dtype)
