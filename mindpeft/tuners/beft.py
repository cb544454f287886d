"""BEFT: a trained vector is added to a linear cell's output, by default to the values of attention alone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import mindspore as ms
import numpy as np
from mindspore import nn, ops

from mindpeft.config import PeftType, register_method
from mindpeft.errors import InputError
from mindpeft.ops.columns import every_row
from mindpeft.tuners.base import Shapes, Site, Tensors, TunerLayer, check_linear, linear_features
from mindpeft.tuners.targeted import TargetedConfig

_TARGETS = {
    "t5 mt5": "v",
    "bert roberta": "value",
    "deberta-v2": "value_proj",
    "opt gptj gpt_neo bart llama llama4 mistral mixtral phi gemma gemma2 gemma3_text qwen2 qwen3": "v_proj",
}


@register_method
@dataclass
class BeftConfig(TargetedConfig):
    """Hugging Face PEFT's configuration of BEFT, key by key.

    Attributes:
        target_modules: names or dotted suffixes of cells, or a regular expression for the full path, or
            "all-linear"; ``None`` takes the model type's default.
        modules_to_save: cells trained and saved whole (a fresh head).
        init_weights: start with zeros, so that nothing changes; else with normal numbers.

    Raises:
        InputError: a value is not allowed, or keys contradict each other.
    """

    init_weights: bool = True

    METHOD: ClassVar[PeftType] = PeftType.BEFT
    DEFAULT_TARGETS: ClassVar = {
        model: [name] for models, name in _TARGETS.items() for model in models.split()
    }

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.init_weights, bool):
            raise InputError(f"init_weights must be true or false, not {self.init_weights!r}")

    def slot_class(self, cell: nn.Cell, path: str) -> type[TunerLayer]:
        check_linear(cell, path, "BEFT", transposed=False)
        return BeftLinear


class BeftLinear(TunerLayer):
    """The vector (1, out)."""

    @classmethod
    def tensor_shapes(cls, site: Site) -> Shapes:
        return {"beft_bias": (1, linear_features(site.cell)[1])}

    @classmethod
    def initial_tensors(cls, site: Site) -> Tensors:
        (shape,) = cls.tensor_shapes(site).values()
        value = np.zeros(shape) if site.config.init_weights else np.random.standard_normal(shape)
        return {"beft_bias": value.astype(np.float32)}

    @classmethod
    def merged(cls, site: Site, weights: Tensors, tensors: Tensors, shared: Tensors | None = None) -> Tensors:
        return {"bias": weights["bias"] + tensors["beft_bias"][0]}

    @classmethod
    def check_merge(cls, site: Site) -> None:
        if getattr(site.cell, "bias", None) is None:
            raise InputError(f"BEFT can't be merged into {site.path!r}, which has no bias")

    def construct(self, x: ms.Tensor) -> ms.Tensor:
        result = self.base_layer(x)
        y = ops.cast(result, self.slot_dtype)
        return ops.cast(y + every_row(self.beft_bias * self.scaling, y), result.dtype)
