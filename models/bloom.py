"""BLOOM (Scao et al., 2022): no position embedding; scores grow with the key's place instead (ALiBi)."""

from __future__ import annotations

from dataclasses import dataclass

import mindspore.nn as nn

from mindpeft.errors import InputError
from mindpeft.models.decoder import (
    DecoderForCausalLM,
    DecoderForSequenceClassification,
    DecoderForTokenClassification,
    DecoderModel,
)
from mindpeft.models.decoder_config import AnyDecoderConfig
from mindpeft.models.gpt_neox import GPTNeoXAttention, GPTNeoXMLP
from mindpeft.nn import norm_and_sum
from mindpeft.nn.decoder import DecoderSpec
from mindpeft.ops.causal_mask import AlibiMask
from mindpeft.ops.dropout import dropout


@dataclass
class BloomConfig(AnyDecoderConfig):
    """Keys of a BLOOM ``config.json``, with Hugging Face's defaults; older files say ``n_embed``."""

    model_type = "bloom"

    vocab_size: int = 250880
    hidden_size: int = 64
    n_layer: int = 2
    n_head: int = 8
    layer_norm_epsilon: float = 1e-5
    initializer_range: float = 0.02
    pad_token_id: int | None = None
    bos_token_id: int | None = 1
    eos_token_id: int | list[int] | None = 2
    apply_residual_connection_post_layernorm: bool = False
    hidden_dropout: float = 0.0
    attention_dropout: float = 0.0
    classifier_dropout: float | None = None
    tie_word_embeddings: bool = True

    @classmethod
    def _from_file(cls, values: dict) -> BloomConfig:
        older = {"n_embed": "hidden_size", "num_attention_heads": "n_head", "num_hidden_layers": "n_layer"}
        found = {older[key]: value for key, value in values.items() if key in older}
        return super()._from_file({**found, **values})

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.hidden_size % self.n_head:
            raise InputError(f"hidden_size {self.hidden_size} is no multiple of n_head {self.n_head}")

    @property
    def num_hidden_layers(self) -> int:
        return self.n_layer

    @property
    def num_attention_heads(self) -> int:
        return self.n_head

    def spec(self) -> DecoderSpec:
        return DecoderSpec(
            layers=self.n_layer,
            width=self.hidden_size,
            heads=self.n_head,
            key_heads=self.n_head,
            head_size=self.hidden_size // self.n_head,
            inner_width=4 * self.hidden_size,
            activation="gelu_new",
            layer_norm=True,
            norm_eps=self.layer_norm_epsilon,
            qkv_bias=True,
            output_bias=True,
            attention_dropout=self.attention_dropout,
            hidden_dropout=self.hidden_dropout,
            norm_in_residual=self.apply_residual_connection_post_layernorm,
            **self.windows(None),
        )


class BloomBlock(nn.Cell):
    """Attention and feed-forward, each behind a norm and added to what came in, or to its norm."""

    def __init__(self, spec: DecoderSpec, layer: int):
        super().__init__()
        self.input_layernorm = spec.norm()
        self.self_attention = GPTNeoXAttention(spec, layer)
        self.post_attention_layernorm = spec.norm()
        self.mlp = GPTNeoXMLP(spec)
        self.dropout = dropout(spec.hidden_dropout)
        self.norm_in_residual = spec.norm_in_residual

    def construct(self, hidden, mask, angles, place=None):
        normed = self.input_layernorm(hidden)
        residual = normed if self.norm_in_residual else hidden
        mixed = self.dropout(self.self_attention(normed, mask, angles, place))
        normed, hidden = norm_and_sum(self.post_attention_layernorm, mixed, residual)
        residual = normed if self.norm_in_residual else hidden
        return residual + self.dropout(self.mlp(normed))


class BloomModel(DecoderModel):
    """The stack of layers: features."""

    config_class = BloomConfig
    base_model_prefix = "transformer"
    layer_class = BloomBlock
    mask_class = AlibiMask
    embedding_name, layers_name, norm_name = "word_embeddings", "h", "ln_f"

    def __init__(self, config: BloomConfig):
        super().__init__(config)
        self.word_embeddings_layernorm = config.spec().norm()

    def embedded(self, words, position_ids):
        return self.word_embeddings_layernorm(words)


class BloomForCausalLM(DecoderForCausalLM):
    """The next token."""

    config_class = BloomConfig
    base_model_prefix = "transformer"
    backbone = BloomModel


class BloomForSequenceClassification(DecoderForSequenceClassification):
    """Labels of a whole text."""

    config_class = BloomConfig
    base_model_prefix = "transformer"
    backbone = BloomModel


class BloomForTokenClassification(DecoderForTokenClassification):
    """A class for each token."""

    config_class = BloomConfig
    base_model_prefix = "transformer"
    backbone = BloomModel
    head_name = "classifier"


HEADS = {
    "AutoModel": BloomModel,
    "AutoModelForCausalLM": BloomForCausalLM,
    "AutoModelForSequenceClassification": BloomForSequenceClassification,
    "AutoModelForTokenClassification": BloomForTokenClassification,
}
