"""Mistral (Jiang et al., 2023): every layer sees a window of tokens, if the config has one."""

from __future__ import annotations

from dataclasses import dataclass

from mindpeft.models.decoder import (
    DecoderForCausalLM,
    DecoderForSequenceClassification,
    DecoderForTokenClassification,
    DecoderModel,
)
from mindpeft.models.decoder_config import FULL, SLIDING, DecoderConfig


@dataclass
class MistralConfig(DecoderConfig):
    """Keys of a Mistral ``config.json``, with Hugging Face's defaults."""

    model_type = "mistral"

    intermediate_size: int = 14336
    num_key_value_heads: int | None = 8
    max_position_embeddings: int = 131072
    sliding_window: int | None = 4096

    def kinds_of_layers(self) -> list[str]:
        return [FULL if self.sliding_window is None else SLIDING] * self.num_hidden_layers


class MistralModel(DecoderModel):
    """The stack of layers: features."""

    config_class = MistralConfig


class MistralForCausalLM(DecoderForCausalLM):
    """The next token."""

    config_class = MistralConfig
    backbone = MistralModel


class MistralForSequenceClassification(DecoderForSequenceClassification):
    """Labels of a whole text."""

    config_class = MistralConfig
    backbone = MistralModel


class MistralForTokenClassification(DecoderForTokenClassification):
    """A class for each token."""

    config_class = MistralConfig
    backbone = MistralModel


HEADS = {
    "AutoModel": MistralModel,
    "AutoModelForCausalLM": MistralForCausalLM,
    "AutoModelForSequenceClassification": MistralForSequenceClassification,
    "AutoModelForTokenClassification": MistralForTokenClassification,
}
