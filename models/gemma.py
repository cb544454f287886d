"""Gemma (Gemma Team, 2024): scaled embeddings, and norms whose files hold the difference to one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from mindpeft.errors import InputError
from mindpeft.models.decoder import (
    DecoderForCausalLM,
    DecoderForSequenceClassification,
    DecoderForTokenClassification,
    DecoderModel,
)
from mindpeft.models.decoder_config import DecoderConfig
from mindpeft.nn.decoder import DecoderSpec


@dataclass
class GemmaConfig(DecoderConfig):
    """Keys of a Gemma ``config.json``, with Hugging Face's defaults."""

    model_type = "gemma"

    vocab_size: int = 256000
    hidden_size: int = 3072
    intermediate_size: int = 24576
    num_hidden_layers: int = 28
    num_attention_heads: int = 16
    num_key_value_heads: int | None = 16
    head_dim: int | None = 256
    hidden_act: str = "gelu_pytorch_tanh"
    max_position_embeddings: int = 8192
    pad_token_id: int | None = 0
    bos_token_id: int | None = 2
    eos_token_id: int | list[int] | None = 1
    tie_word_embeddings: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.extra.get("use_bidirectional_attention"):
            raise InputError("use_bidirectional_attention is true, but only decoders are supported")

    @property
    def embedding_scale(self) -> float:
        return self.hidden_size**0.5

    def spec(self, **flags: Any) -> DecoderSpec:
        return super().spec(norm_offset=1.0, **flags)


class GemmaModel(DecoderModel):
    """The stack of layers: features."""

    config_class = GemmaConfig


class GemmaForCausalLM(DecoderForCausalLM):
    """The next token."""

    config_class = GemmaConfig
    backbone = GemmaModel


class GemmaForSequenceClassification(DecoderForSequenceClassification):
    """Labels of a whole text."""

    config_class = GemmaConfig
    backbone = GemmaModel


class GemmaForTokenClassification(DecoderForTokenClassification):
    """A class for each token."""

    config_class = GemmaConfig
    backbone = GemmaModel


HEADS = {
    "AutoModel": GemmaModel,
    "AutoModelForCausalLM": GemmaForCausalLM,
    "AutoModelForSequenceClassification": GemmaForSequenceClassification,
    "AutoModelForTokenClassification": GemmaForTokenClassification,
}
