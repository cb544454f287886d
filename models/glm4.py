"""GLM-4-0414 (GLM Team, 2025): GLM with a norm behind each half of a layer as well."""

from __future__ import annotations

from dataclasses import dataclass

from mindpeft.models.decoder import (
    DecoderForCausalLM,
    DecoderForSequenceClassification,
    DecoderForTokenClassification,
    DecoderModel,
)
from mindpeft.models.glm import GlmConfig, GlmLayer
from mindpeft.nn import norm_and_sum
from mindpeft.nn.decoder import DecoderSpec


@dataclass
class Glm4Config(GlmConfig):
    """Keys of a GLM-4 ``config.json``, with Hugging Face's defaults."""

    model_type = "glm4"


class Glm4Layer(GlmLayer):
    """Attention and feed-forward between two norms each."""

    def __init__(self, spec: DecoderSpec, layer: int):
        super().__init__(spec, layer)
        self.post_self_attn_layernorm = spec.norm()
        self.post_mlp_layernorm = spec.norm()

    def construct(self, hidden, mask, angles, place=None):
        mixed = self.self_attn(self.input_layernorm(hidden), mask, angles, place)
        mixed = self.post_self_attn_layernorm(mixed)
        normed, hidden = norm_and_sum(self.post_attention_layernorm, mixed, hidden)
        return hidden + self.post_mlp_layernorm(self.mlp(normed))


class Glm4Model(DecoderModel):
    """The stack of layers: features."""

    config_class = Glm4Config
    layer_class = Glm4Layer


class Glm4ForCausalLM(DecoderForCausalLM):
    """The next token."""

    config_class = Glm4Config
    backbone = Glm4Model


class Glm4ForSequenceClassification(DecoderForSequenceClassification):
    """Labels of a whole text."""

    config_class = Glm4Config
    backbone = Glm4Model


class Glm4ForTokenClassification(DecoderForTokenClassification):
    """A class for each token."""

    config_class = Glm4Config
    backbone = Glm4Model


HEADS = {
    "AutoModel": Glm4Model,
    "AutoModelForCausalLM": Glm4ForCausalLM,
    "AutoModelForSequenceClassification": Glm4ForSequenceClassification,
    "AutoModelForTokenClassification": Glm4ForTokenClassification,
}
