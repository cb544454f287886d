"""LLaMA-Adapter: trained tokens that the upper layers attend to besides, behind a gate that begins at zero.

Zhang et al. 2023, "LLaMA-Adapter: Efficient Fine-tuning of Language Models with Zero-init Attention":

    output(attention(x)) + output(gate * softmax(q K^T / sqrt(size)) V)

K and V are the layer's own projections of the trained tokens, without positions. GPT-2 adds the second part
without its output projection, as Hugging Face PEFT computes it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import mindspore as ms
import numpy as np
from mindspore import nn, ops

from mindpeft.config import PeftConfig, PeftType, register_method
from mindpeft.errors import InputError
from mindpeft.nn.decoder import DecoderAttention
from mindpeft.ops.attention import Attention
from mindpeft.tuners.base import Shapes, Site, Slot, Tensors, TunerLayer, original
from mindpeft.tuners.targeted import check_count

if TYPE_CHECKING:
    from mindpeft.tuners.plan import BaseModel

# model_type -> the name of its attention cells, and whether their output projection sees the second part.
ATTENTIONS = {"llama": ("self_attn", True), "mistral": ("self_attn", True), "gpt2": ("attn", False)}


@register_method
@dataclass
class AdaptionPromptConfig(PeftConfig):
    """Hugging Face PEFT's configuration of LLaMA-Adapter, key by key.

    Attributes:
        target_modules: the name of the attention cells; ``None`` takes the model type's.
        adapter_len: how many trained tokens a layer has.
        adapter_layers: how many layers, counted from the last, have them.

    Raises:
        InputError: a value is not allowed; for a model, that it is of another type.
    """

    target_modules: str | None = None
    adapter_len: int | None = None
    adapter_layers: int | None = None

    METHOD: ClassVar[PeftType] = PeftType.ADAPTION_PROMPT
    EXAMPLE: ClassVar[dict[str, Any]] = {"adapter_len": 10, "adapter_layers": 2}

    def __post_init__(self) -> None:
        super().__post_init__()
        for key in ("adapter_len", "adapter_layers"):
            check_count(key, getattr(self, key))

    def resolve(self, base: BaseModel) -> None:
        kind = getattr(getattr(base.model, "config", None), "model_type", None)
        if kind not in ATTENTIONS:
            raise InputError(f"ADAPTION_PROMPT is for models of type {', '.join(ATTENTIONS)}, not {kind}")
        self.target_modules = self.target_modules or ATTENTIONS[kind][0]

    def slot_classes(self, base: BaseModel) -> dict[str, type[Slot]]:
        name = self.target_modules
        paths = [path for path in base.cells if path == name or path.endswith(f".{name}")]
        wrong = [path for path in paths if not isinstance(original(base.cells[path]), DecoderAttention)]
        if wrong:
            raise InputError(f"target_modules {name!r}: {wrong[0]!r} is no attention of a decoder")
        if len(paths) < self.adapter_layers:
            raise InputError(
                f"adapter_layers is {self.adapter_layers}, but {len(paths)} cells are called {name!r}"
            )
        projects = ATTENTIONS[base.model.config.model_type][1]
        kind = AdaptionPromptLayer if projects else UnprojectedLayer
        return dict.fromkeys(paths[-self.adapter_layers :], kind)


class AdaptionPromptLayer(TunerLayer):
    """Adds what the attention's queries find in trained tokens."""

    PROJECTS: ClassVar[bool] = True

    def __init__(self, base_layer: nn.Cell, *slot: Any) -> None:
        super().__init__(base_layer, *slot)
        object.__setattr__(self, "inner", original(self.base_layer))  # a child of base_layer, not of this
        heads = self.inner.width // self.inner.head_size
        self.attention = Attention(heads, self.inner.head_size)
        self.tile = ops.Tile()

    @classmethod
    def tensor_shapes(cls, site: Site) -> Shapes:
        width = site.cell.width
        return {"adaption_prompt": (1, site.config.adapter_len, width), "adaption_gate": (1,)}

    @classmethod
    def initial_tensors(cls, site: Site) -> Tensors:
        shape = cls.tensor_shapes(site)["adaption_prompt"]
        prompt = np.random.standard_normal(shape).astype(np.float32)
        return {"adaption_prompt": prompt, "adaption_gate": np.zeros(1, np.float32)}

    @classmethod
    def holds(cls, room: Shapes, shapes: Shapes) -> bool:
        return room == shapes  # the softmax would see more tokens

    def construct(
        self, hidden: ms.Tensor, mask: ms.Tensor, angles: Any, place: ms.Tensor | None = None
    ) -> ms.Tensor:
        result = self.base_layer(hidden, mask, angles, place)
        found = ops.cast(self.found(hidden, angles), result.dtype)
        return self.unless_off(result + found, result)

    def found(self, hidden: ms.Tensor, angles: Any) -> ms.Tensor:
        """What the queries find in the trained tokens, (batch, length, width)."""
        cell = self.inner
        query = cell.heads_of(hidden, angles)[0]
        _, key, value = cell.projected(ops.cast(self.adaption_prompt, hidden.dtype))
        rows = (query.shape[0], 1, 1, 1)
        key, value = cell.split_keys(key), cell.split_keys(value) * ops.cast(self.adaption_gate, value.dtype)
        mixed = self.attention(query, self.tile(key, rows), self.tile(value, rows))
        return cell.output(mixed) if self.PROJECTS else mixed


class UnprojectedLayer(AdaptionPromptLayer):
    """The same without the output projection."""

    PROJECTS = False
