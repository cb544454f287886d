"""Gemma 2 (Gemma Team, 2024): windows in every other layer, bounded scores, norms around each half."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from mindpeft.models.decoder import (
    DecoderForCausalLM,
    DecoderForSequenceClassification,
    DecoderForTokenClassification,
    DecoderModel,
)
from mindpeft.models.decoder_config import kinds_from
from mindpeft.models.gemma import GemmaConfig
from mindpeft.nn import norm_and_sum
from mindpeft.nn.decoder import DecoderLayer, DecoderSpec


@dataclass
class Gemma2Config(GemmaConfig):
    """Keys of a Gemma 2 ``config.json``, with Hugging Face's defaults."""

    model_type = "gemma2"

    hidden_size: int = 2304
    intermediate_size: int = 9216
    num_hidden_layers: int = 26
    num_attention_heads: int = 8
    num_key_value_heads: int | None = 4
    hidden_activation: str = "gelu_pytorch_tanh"
    query_pre_attn_scalar: int = 256
    sliding_window: int | None = 4096
    layer_types: list[str] | None = None
    final_logit_softcapping: float | None = 30.0
    attn_logit_softcapping: float | None = 50.0

    @property
    def logit_softcap(self) -> float | None:
        return self.final_logit_softcapping

    def kinds_of_layers(self) -> list[str]:
        slide = [layer % 2 == 0 for layer in range(self.num_hidden_layers)]
        return kinds_from(self, self.layer_types, slide)

    def spec(self, **flags: Any) -> DecoderSpec:
        own = {
            "activation": self.hidden_activation,
            "score_scale": self.query_pre_attn_scalar**-0.5,
            "score_softcap": self.attn_logit_softcapping,
        }
        return super().spec(**{**own, **flags})


class Gemma2Layer(DecoderLayer):
    """Attention and feed-forward between two norms each."""

    def __init__(self, spec: DecoderSpec, layer: int):
        super().__init__(spec, layer)
        self.pre_feedforward_layernorm = spec.norm()
        self.post_feedforward_layernorm = spec.norm()

    def construct(self, hidden, mask, angles, place=None):
        mixed = self.self_attn(self.input_layernorm(hidden), mask, angles, place)
        mixed = self.post_attention_layernorm(mixed)
        normed, hidden = norm_and_sum(self.pre_feedforward_layernorm, mixed, hidden)
        return hidden + self.post_feedforward_layernorm(self.mlp(normed))


class Gemma2Model(DecoderModel):
    """The stack of layers: features."""

    config_class = Gemma2Config
    layer_class = Gemma2Layer


class Gemma2ForCausalLM(DecoderForCausalLM):
    """The next token."""

    config_class = Gemma2Config
    backbone = Gemma2Model


class Gemma2ForSequenceClassification(DecoderForSequenceClassification):
    """Labels of a whole text."""

    config_class = Gemma2Config
    backbone = Gemma2Model


class Gemma2ForTokenClassification(DecoderForTokenClassification):
    """A class for each token."""

    config_class = Gemma2Config
    backbone = Gemma2Model


HEADS = {
    "AutoModel": Gemma2Model,
    "AutoModelForCausalLM": Gemma2ForCausalLM,
    "AutoModelForSequenceClassification": Gemma2ForSequenceClassification,
    "AutoModelForTokenClassification": Gemma2ForTokenClassification,
}
