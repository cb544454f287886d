"""Llama 1, 2 and 3 (Touvron et al., 2023), and DeepSeek's distillates of its shape."""

from __future__ import annotations

from dataclasses import dataclass

from mindpeft.models.decoder import (
    DecoderForCausalLM,
    DecoderForSequenceClassification,
    DecoderForTokenClassification,
    DecoderModel,
)
from mindpeft.models.decoder_config import DecoderConfig
from mindpeft.nn.decoder import DecoderSpec


@dataclass
class LlamaConfig(DecoderConfig):
    """Keys of a Llama ``config.json``, with Hugging Face's defaults."""

    model_type = "llama"

    mlp_bias: bool = False

    def spec(self) -> DecoderSpec:
        return super().spec(mlp_bias=self.mlp_bias)


class LlamaModel(DecoderModel):
    """The stack of layers: features."""

    config_class = LlamaConfig


class LlamaForCausalLM(DecoderForCausalLM):
    """The next token."""

    config_class = LlamaConfig
    backbone = LlamaModel


class LlamaForSequenceClassification(DecoderForSequenceClassification):
    """Labels of a whole text."""

    config_class = LlamaConfig
    backbone = LlamaModel


class LlamaForTokenClassification(DecoderForTokenClassification):
    """A class for each token."""

    config_class = LlamaConfig
    backbone = LlamaModel


HEADS = {
    "AutoModel": LlamaModel,
    "AutoModelForCausalLM": LlamaForCausalLM,
    "AutoModelForSequenceClassification": LlamaForSequenceClassification,
    "AutoModelForTokenClassification": LlamaForTokenClassification,
}
