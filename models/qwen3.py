"""Qwen3 (Yang et al., 2025): every head's queries and keys are normalised."""

from __future__ import annotations

from dataclasses import dataclass

from mindpeft.models.decoder import (
    DecoderForCausalLM,
    DecoderForSequenceClassification,
    DecoderForTokenClassification,
    DecoderModel,
)
from mindpeft.models.decoder_config import DecoderConfig
from mindpeft.models.qwen2 import Qwen2Config
from mindpeft.nn.decoder import DecoderSpec


@dataclass
class Qwen3Config(Qwen2Config):
    """Keys of a Qwen3 ``config.json``, with Hugging Face's defaults."""

    model_type = "qwen3"

    head_dim: int | None = 128

    def spec(self) -> DecoderSpec:
        return DecoderConfig.spec(self, query_key_norm=True)


class Qwen3Model(DecoderModel):
    """The stack of layers: features."""

    config_class = Qwen3Config


class Qwen3ForCausalLM(DecoderForCausalLM):
    """The next token."""

    config_class = Qwen3Config
    backbone = Qwen3Model


class Qwen3ForSequenceClassification(DecoderForSequenceClassification):
    """Labels of a whole text."""

    config_class = Qwen3Config
    backbone = Qwen3Model


class Qwen3ForTokenClassification(DecoderForTokenClassification):
    """A class for each token."""

    config_class = Qwen3Config
    backbone = Qwen3Model


HEADS = {
    "AutoModel": Qwen3Model,
    "AutoModelForCausalLM": Qwen3ForCausalLM,
    "AutoModelForSequenceClassification": Qwen3ForSequenceClassification,
    "AutoModelForTokenClassification": Qwen3ForTokenClassification,
}
