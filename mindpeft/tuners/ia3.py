"""(IA)3: one trained factor for each feature of a cell's output, or of a feed-forward cell's input.

Liu et al. 2022, "Few-Shot Parameter-Efficient Fine-Tuning is Better and Cheaper than In-Context Learning":
y = l * (W x + b), or y = W (l * x) + b. A convolution's features are its channels.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import mindspore as ms
import numpy as np
from mindspore import nn, ops

from mindpeft.config import PeftType, register_method
from mindpeft.errors import InputError
from mindpeft.tuners.base import (
    Shapes,
    Site,
    Tensors,
    TunerLayer,
    check_linear,
    is_linear,
    is_transposed,
    linear_features,
    refuse_cell,
)
from mindpeft.tuners.targeted import TargetedConfig, check_expression, name_set

if TYPE_CHECKING:
    from mindpeft.tuners.plan import BaseModel

# Model types -> the targets, those after "|" being feed-forward cells.
_TARGETS = {
    "t5": "k v | wo",
    "mt5": "k v wi_1 |",
    "gpt2 gpt_bigcode": "c_attn | mlp.c_proj",
    "bloom": "query_key_value | mlp.dense_4h_to_h",
    "gpt_neox RefinedWebModel RefinedWeb falcon": "query_key_value | dense_4h_to_h",
    "bert roberta": "key value | output.dense",
    "deberta-v2": "key_proj value_proj | output.dense",
    "deberta": "in_proj | output.dense",
    "opt": "q_proj k_proj | fc2",
    "bart phi": "q_proj v_proj | fc2",
    "gptj": "q_proj v_proj | fc_out",
    "gpt_neo": "q_proj v_proj | c_proj",
    "llama mistral": "k_proj v_proj | down_proj",
    "llama4 gemma gemma2 gemma3_text qwen2 qwen3": "q_proj v_proj | down_proj",
    "mixtral": "k_proj v_proj | w2",
}
IA3_TARGETS = {
    model: names.replace("|", "").split() for models, names in _TARGETS.items() for model in models.split()
}
IA3_FEEDFORWARD = {
    model: names.partition("|")[2].split() for models, names in _TARGETS.items() for model in models.split()
}


@register_method
@dataclass
class IA3Config(TargetedConfig):
    """Hugging Face PEFT's configuration of (IA)3, key by key.

    Attributes:
        target_modules: names or dotted suffixes of cells, or a regular expression for the full path, or
            "all-linear"; ``None`` takes the model type's default.
        exclude_modules: cells never targeted, given the same way.
        feedforward_modules: those of the targets whose input is scaled, by the ends of their names or a
            regular expression for the full path; ``None`` takes the model type's default.
        fan_in_fan_out: the weights are (in, out); set from the cells themselves.
        modules_to_save: cells trained and saved whole (a fresh head).
        init_ia3_weights: start with ones, so that nothing changes; else with normal numbers.

    Raises:
        InputError: a value is not allowed, or a feed-forward module is no target.
    """

    exclude_modules: set[str] | list[str] | str | None = None
    feedforward_modules: set[str] | list[str] | str | None = None
    fan_in_fan_out: bool = False
    init_ia3_weights: bool = True

    METHOD: ClassVar[PeftType] = PeftType.IA3
    DEFAULT_TARGETS = IA3_TARGETS

    def __post_init__(self) -> None:
        super().__post_init__()
        self.feedforward_modules = name_set(self.feedforward_modules, "feedforward_modules")
        if isinstance(self.feedforward_modules, str):
            check_expression("feedforward_modules", self.feedforward_modules)
        targets, feedforward = self.target_modules, self.feedforward_modules
        if isinstance(targets, set) and isinstance(feedforward, set) and feedforward - targets:
            raise InputError(
                f"feedforward_modules must be among target_modules; not there: "
                f"{', '.join(sorted(feedforward - targets))}"
            )

    def resolve(self, base: BaseModel) -> None:
        super().resolve(base)
        if self.feedforward_modules is None:
            if base.model_type not in IA3_FEEDFORWARD:
                raise InputError(
                    f"feedforward_modules is not set and there is no default for model_type "
                    f"{base.model_type!r}; give those of target_modules whose input is to be scaled, or []"
                )
            self.feedforward_modules = set(IA3_FEEDFORWARD[base.model_type])

    def is_feedforward(self, path: str) -> bool:
        """Whether a target's input is scaled; like PEFT, names need not end at a dot."""
        if isinstance(self.feedforward_modules, str):
            return re.fullmatch(self.feedforward_modules, path) is not None
        return path.endswith(tuple(self.feedforward_modules))

    def slot_class(self, cell: nn.Cell, path: str) -> type[TunerLayer]:
        on_input = self.is_feedforward(path)
        if isinstance(cell, nn.Conv2d | nn.Conv3d):
            return IA3ConvInput if on_input else IA3ConvOutput
        if not is_linear(cell):
            raise refuse_cell(cell, path, "(IA)3", "linear cells, nn.Conv2d and nn.Conv3d")
        check_linear(cell, path, "(IA)3")
        return IA3Input if on_input else IA3Output


class IA3Layer(TunerLayer):
    """What both kinds share: one tensor of factors."""

    @classmethod
    def initial_tensors(cls, site: Site) -> Tensors:
        (shape,) = cls.tensor_shapes(site).values()
        value = np.ones(shape) if site.config.init_ia3_weights else np.random.standard_normal(shape)
        return {"ia3_l": value.astype(np.float32)}

    def scaled(self, x: ms.Tensor) -> ms.Tensor:
        """``x`` with its columns scaled, in its own dtype."""
        # Choosing between factors rather than between results: these are as large as the batch.
        factors = self.unless_off(self.ia3_l, ops.ones_like(self.ia3_l))
        return ops.cast(self.scale_columns(ops.cast(x, self.slot_dtype), factors), x.dtype)


class IA3Output(IA3Layer):
    """Factors (out, 1) on the output, bias included."""

    @classmethod
    def tensor_shapes(cls, site: Site) -> Shapes:
        return {"ia3_l": (linear_features(site.cell)[1], 1)}

    @classmethod
    def merged(cls, site: Site, weights: Tensors, tensors: Tensors, shared: Tensors | None = None) -> Tensors:
        factors = tensors["ia3_l"]
        changed = {"weight": weights["weight"] * (factors.T if is_transposed(site.cell) else factors)}
        if "bias" in weights:
            changed["bias"] = weights["bias"] * factors[:, 0]
        return changed

    def construct(self, x: ms.Tensor) -> ms.Tensor:
        return self.scaled(self.base_layer(x))


class IA3Input(IA3Layer):
    """Factors (1, in) on the input of a feed-forward cell."""

    @classmethod
    def tensor_shapes(cls, site: Site) -> Shapes:
        return {"ia3_l": (1, linear_features(site.cell)[0])}

    @classmethod
    def merged(cls, site: Site, weights: Tensors, tensors: Tensors, shared: Tensors | None = None) -> Tensors:
        factors = tensors["ia3_l"]
        return {"weight": weights["weight"] * (factors.T if is_transposed(site.cell) else factors)}

    def construct(self, x: ms.Tensor) -> ms.Tensor:
        return self.base_layer(self.scaled(x))


class Channels(IA3Layer):
    """Factors (1, channels, 1, 1) for a convolution of images, (1, channels, 1, 1, 1) for one of volumes."""

    CHANNELS: ClassVar[str]

    @classmethod
    def tensor_shapes(cls, site: Site) -> Shapes:
        axes = site.cell.weight.ndim - 2
        return {"ia3_l": (1, getattr(site.cell, cls.CHANNELS), *(1 for _ in range(axes)))}

    def scaled(self, x: ms.Tensor) -> ms.Tensor:
        factors = self.unless_off(self.ia3_l, ops.ones_like(self.ia3_l))
        factors = ops.tile(factors, (x.shape[0], 1, *x.shape[2:]))
        return ops.cast(ops.cast(x, self.slot_dtype) * factors, x.dtype)


class IA3ConvOutput(Channels, IA3Output):
    """Factors on the channels of a convolution's output, bias included."""

    CHANNELS = "out_channels"

    @classmethod
    def merged(cls, site: Site, weights: Tensors, tensors: Tensors, shared: Tensors | None = None) -> Tensors:
        factors = tensors["ia3_l"]
        changed = {"weight": weights["weight"] * np.swapaxes(factors, 0, 1)}
        if "bias" in weights:
            changed["bias"] = weights["bias"] * factors.reshape(-1)
        return changed


class IA3ConvInput(Channels, IA3Input):
    """Factors on the channels of a convolution's input."""

    CHANNELS = "in_channels"

    @classmethod
    def merged(cls, site: Site, weights: Tensors, tensors: Tensors, shared: Tensors | None = None) -> Tensors:
        weight, groups = weights["weight"], site.cell.group
        factors = tensors["ia3_l"].reshape(groups, -1)  # each group of outputs sees inputs of its own
        factors = np.repeat(factors, len(weight) // groups, axis=0)
        return {"weight": weight * factors.reshape(*factors.shape, *(1 for _ in weight.shape[2:]))}
