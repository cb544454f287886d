"""The text model of Gemma 3 (Gemma Team, 2025): five windows, one full layer, each with its own angles."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from mindpeft.models.decoder import (
    DecoderForCausalLM,
    DecoderForSequenceClassification,
    DecoderForTokenClassification,
    DecoderModel,
)
from mindpeft.models.decoder_config import FULL, kinds_from
from mindpeft.models.gemma2 import Gemma2Config, Gemma2Layer
from mindpeft.nn.decoder import DecoderSpec


@dataclass
class Gemma3TextConfig(Gemma2Config):
    """Keys of a Gemma 3 text ``config.json``, with Hugging Face's defaults."""

    model_type = "gemma3_text"

    THETA = 1_000_000.0

    vocab_size: int = 262208
    max_position_embeddings: int = 131072
    rope_local_base_freq: float = 10000.0
    sliding_window_pattern: int = 6
    final_logit_softcapping: float | None = None
    attn_logit_softcapping: float | None = None

    def kinds_of_layers(self) -> list[str]:
        slide = [(layer + 1) % self.sliding_window_pattern != 0 for layer in range(self.num_hidden_layers)]
        return kinds_from(self, self.layer_types, slide)

    def rope_of(self, kind: str) -> dict[str, Any]:
        if kind == FULL or self.rope_parameters is not None:
            return super().rope_of(kind)
        return {"rope_theta": self.rope_local_base_freq}

    def spec(self, **flags: Any) -> DecoderSpec:
        return super().spec(query_key_norm=True, **flags)


class Gemma3TextModel(DecoderModel):
    """The stack of layers: features."""

    config_class = Gemma3TextConfig
    layer_class = Gemma2Layer


class Gemma3TextForCausalLM(DecoderForCausalLM):
    """The next token."""

    config_class = Gemma3TextConfig
    backbone = Gemma3TextModel


class Gemma3TextForSequenceClassification(DecoderForSequenceClassification):
    """Labels of a whole text."""

    config_class = Gemma3TextConfig
    backbone = Gemma3TextModel


class Gemma3TextForTokenClassification(DecoderForTokenClassification):
    """A class for each token."""

    config_class = Gemma3TextConfig
    backbone = Gemma3TextModel


HEADS = {
    "AutoModel": Gemma3TextModel,
    "AutoModelForCausalLM": Gemma3TextForCausalLM,
    "AutoModelForSequenceClassification": Gemma3TextForSequenceClassification,
    "AutoModelForTokenClassification": Gemma3TextForTokenClassification,
}
