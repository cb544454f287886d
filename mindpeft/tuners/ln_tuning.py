"""LN tuning: weights and biases of their own for normalisation layers.

Zhao et al. 2023, "Tuning LayerNorm in Attention: Towards Efficient Multi-Modal LLM Finetuning". The adapter
holds full values, not differences, and stands in for the layer's own.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import mindspore as ms
import numpy as np
from mindspore import nn, ops

from mindpeft.config import PeftType, register_method
from mindpeft.nn.normalization import LayerNorm
from mindpeft.parameters import CLASSIC_NAMES
from mindpeft.tuners.base import Shapes, Site, Tensors, TunerLayer, original, refuse_cell
from mindpeft.tuners.targeted import TargetedConfig

_INPUT_AND_AFTER = "input_layernorm post_attention_layernorm"
_TARGETS = {
    "llama mistral gemma": f"{_INPUT_AND_AFTER} norm",
    "bloom falcon": f"{_INPUT_AND_AFTER} ln_f",
    "llava": f"multi_modal_projector {_INPUT_AND_AFTER} norm embed_tokens lm_head",
    "t5 mt5": "layer_norm final_layer_norm",
    "bart": "self_attn_layer_norm encoder_attn_layer_norm final_layer_norm",
    "gpt2": "ln_1 ln_2 ln_f",
    "blip-2": "layernorm LayerNorm final_layer_norm self_attn_layer_norm",
    "gptj": "ln_1 ln_f",
    "phi": "input_layernorm final_layernorm",
    "gemma2 gemma3_text": f"{_INPUT_AND_AFTER} pre_feedforward_layernorm post_feedforward_layernorm norm",
    "qwen2 qwen3": "post_attention_layernorm",
}
LN_TARGETS = {model: names.split() for models, names in _TARGETS.items() for model in models.split()}


@register_method
@dataclass
class LNTuningConfig(TargetedConfig):
    """Hugging Face PEFT's configuration of LN tuning, key by key.

    Attributes:
        target_modules: names or dotted suffixes of normalisation cells, or a regular expression for the full
            path; ``None`` takes the model type's default.
        exclude_modules: cells never targeted, given the same way.
        modules_to_save: cells trained and saved whole (a fresh head).

    Raises:
        InputError: a value is not allowed; for a model, that a target is no normalisation.
    """

    exclude_modules: set[str] | list[str] | str | None = None

    METHOD: ClassVar[PeftType] = PeftType.LN_TUNING
    EXAMPLE: ClassVar[Mapping[str, Any]] = {"target_modules": ["LayerNorm"]}
    DEFAULT_TARGETS = LN_TARGETS

    def slot_class(self, cell: nn.Cell, path: str) -> type[TunerLayer]:
        leaves = {name.rpartition(".")[2] for name in tensor_attributes(cell)}
        inside = sum(1 for _ in cell.get_parameters())
        is_norm = "norm" in type(cell).__name__.lower() and "weight" in leaves
        if not is_norm or leaves - {"weight", "bias"} or inside != len(leaves):
            raise refuse_cell(cell, path, "LN tuning", "normalisations without running statistics")
        return LNTuningLayer


def tensor_attributes(cell: nn.Cell) -> dict[str, str]:
    """The adapter's tensors for a cell, and the cell's attributes that they stand in for."""
    names = [name.rpartition(".")[2] for name, _ in cell.parameters_and_names(expand=False)]
    return {f"ln_tuning_layers.{CLASSIC_NAMES.get(name, name)}": name for name in names}


class LNTuningLayer(TunerLayer):
    """A second copy of a normalisation cell, with the slot's weight and bias."""

    def __init__(self, base_layer: nn.Cell, path: str, shapes: Shapes, *slot: Any) -> None:
        super().__init__(base_layer, path, {}, *slot)
        self.ln_tuning_layers = copy.deepcopy(original(base_layer))
        self.reserve(shapes)
        # Of our own cell the weights are chosen, and one normalisation is enough; of others, its results.
        self.chooses_weights = (
            isinstance(base_layer, LayerNorm) and base_layer.weight.dtype == self.slot_dtype
        )

    @classmethod
    def tensor_shapes(cls, site: Site) -> Shapes:
        return {
            name: tuple(getattr(site.cell, attribute).shape)
            for name, attribute in tensor_attributes(site.cell).items()
        }

    @classmethod
    def initial_tensors(cls, site: Site) -> Tensors:
        return {
            name: getattr(site.cell, attribute).asnumpy().astype(np.float32)
            for name, attribute in tensor_attributes(site.cell).items()
        }

    @classmethod
    def merged(cls, site: Site, weights: Tensors, tensors: Tensors, shared: Tensors | None = None) -> Tensors:
        return {attribute: tensors[name] for name, attribute in tensor_attributes(site.cell).items()}

    def _create(self, name: str, value: np.ndarray, trainable: bool) -> None:
        tensor = ms.Tensor(value, self.slot_dtype)
        parameter = ms.Parameter(tensor, name=self._name(name), requires_grad=trainable)
        setattr(self.ln_tuning_layers, tensor_attributes(self.ln_tuning_layers)[name], parameter)

    def slot(self, name: str) -> ms.Parameter:
        return getattr(self.ln_tuning_layers, tensor_attributes(self.ln_tuning_layers)[name])

    def construct(self, x: ms.Tensor) -> ms.Tensor:
        if self.chooses_weights:
            weight = self.unless_off(self.ln_tuning_layers.weight, self.base_layer.weight)
            bias = self.unless_off(self.ln_tuning_layers.bias, self.base_layer.bias)
            return self.base_layer.norm(x, weight, bias)
        plain = self.base_layer(x)
        tuned = self.ln_tuning_layers(ops.cast(x, self.slot_dtype))
        return self.unless_off(ops.cast(tuned, plain.dtype), plain)
