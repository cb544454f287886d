"""GLM-4-9B in Hugging Face's own layout (GLM Team, 2024): half of each head turned, by neighbours."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from mindpeft.models.decoder import (
    DecoderForCausalLM,
    DecoderForSequenceClassification,
    DecoderForTokenClassification,
    DecoderModel,
)
from mindpeft.models.decoder_config import DecoderConfig
from mindpeft.nn.decoder import DecoderLayer, DecoderSpec, JoinedMLP


@dataclass
class GlmConfig(DecoderConfig):
    """Keys of a GLM ``config.json``, with Hugging Face's defaults."""

    model_type = "glm"
    INTERLEAVED = True

    vocab_size: int = 151552
    intermediate_size: int = 13696
    num_hidden_layers: int = 40
    num_key_value_heads: int | None = 2
    head_dim: int | None = 128
    max_position_embeddings: int = 131072
    rms_norm_eps: float = 1.5625e-7
    partial_rotary_factor: float | None = 0.5
    pad_token_id: int | None = 151329
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    attention_bias: bool = True

    def spec(self, **flags: Any) -> DecoderSpec:
        return super().spec(output_bias=False, **flags)


class GlmLayer(DecoderLayer):
    """A layer with a joined gate."""

    mlp_class = JoinedMLP


class GlmModel(DecoderModel):
    """The stack of layers: features."""

    config_class = GlmConfig
    layer_class = GlmLayer


class GlmForCausalLM(DecoderForCausalLM):
    """The next token."""

    config_class = GlmConfig
    backbone = GlmModel


class GlmForSequenceClassification(DecoderForSequenceClassification):
    """Labels of a whole text."""

    config_class = GlmConfig
    backbone = GlmModel


class GlmForTokenClassification(DecoderForTokenClassification):
    """A class for each token."""

    config_class = GlmConfig
    backbone = GlmModel


HEADS = {
    "AutoModel": GlmModel,
    "AutoModelForCausalLM": GlmForCausalLM,
    "AutoModelForSequenceClassification": GlmForSequenceClassification,
    "AutoModelForTokenClassification": GlmForTokenClassification,
}
