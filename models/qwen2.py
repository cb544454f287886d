"""Qwen2 and Qwen2.5 (Yang et al., 2024): queries, keys and values with a bias."""

from __future__ import annotations

from dataclasses import dataclass

from mindpeft.models.decoder import (
    DecoderForCausalLM,
    DecoderForSequenceClassification,
    DecoderForTokenClassification,
    DecoderModel,
)
from mindpeft.models.decoder_config import DecoderConfig, kinds_from
from mindpeft.nn.decoder import DecoderSpec


@dataclass
class Qwen2Config(DecoderConfig):
    """Keys of a Qwen2 ``config.json``, with Hugging Face's defaults."""

    model_type = "qwen2"

    vocab_size: int = 151936
    intermediate_size: int = 22016
    num_key_value_heads: int | None = 32
    max_position_embeddings: int = 32768
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    use_sliding_window: bool = False
    sliding_window: int | None = 4096
    max_window_layers: int = 28
    layer_types: list[str] | None = None

    def kinds_of_layers(self) -> list[str]:
        window = self.use_sliding_window and self.sliding_window is not None
        slide = [window and layer >= self.max_window_layers for layer in range(self.num_hidden_layers)]
        return kinds_from(self, self.layer_types, slide)

    def spec(self) -> DecoderSpec:
        return super().spec(qkv_bias=True, output_bias=False)


class Qwen2Model(DecoderModel):
    """The stack of layers: features."""

    config_class = Qwen2Config


class Qwen2ForCausalLM(DecoderForCausalLM):
    """The next token."""

    config_class = Qwen2Config
    backbone = Qwen2Model


class Qwen2ForSequenceClassification(DecoderForSequenceClassification):
    """Labels of a whole text."""

    config_class = Qwen2Config
    backbone = Qwen2Model


class Qwen2ForTokenClassification(DecoderForTokenClassification):
    """A class for each token."""

    config_class = Qwen2Config
    backbone = Qwen2Model


HEADS = {
    "AutoModel": Qwen2Model,
    "AutoModelForCausalLM": Qwen2ForCausalLM,
    "AutoModelForSequenceClassification": Qwen2ForSequenceClassification,
    "AutoModelForTokenClassification": Qwen2ForTokenClassification,
}
