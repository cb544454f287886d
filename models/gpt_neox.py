"""GPT-NeoX and Pythia (Black et al., 2022): attention beside feed-forward, a part of each head turned."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import mindspore.nn as nn

from mindpeft.models.decoder import (
    DecoderForCausalLM,
    DecoderForSequenceClassification,
    DecoderForTokenClassification,
    DecoderModel,
)
from mindpeft.models.decoder_config import DecoderConfig
from mindpeft.nn import Linear, norm_and_sum
from mindpeft.nn.decoder import DecoderAttention, DecoderSpec
from mindpeft.ops.activations import activation
from mindpeft.ops.dropout import dropout


@dataclass
class GPTNeoXConfig(DecoderConfig):
    """Keys of a GPT-NeoX ``config.json``, with Hugging Face's defaults."""

    model_type = "gpt_neox"

    vocab_size: int = 50432
    hidden_size: int = 6144
    num_hidden_layers: int = 44
    num_attention_heads: int = 64
    intermediate_size: int = 24576
    hidden_act: str = "gelu"
    hidden_dropout: float = 0.0
    classifier_dropout: float | None = 0.1
    layer_norm_eps: float = 1e-5
    bos_token_id: int | None = 0
    use_parallel_residual: bool = True
    rotary_pct: float = 0.25
    rotary_emb_base: float = 10000.0
    attention_bias: bool = True

    def rope_of(self, kind: str) -> dict[str, Any]:
        own = {"rope_theta": self.rotary_emb_base, "partial_rotary_factor": self.rotary_pct}
        return {**own, **(self.rope_scaling or {}), **(self.rope_parameters or {})}

    def spec(self) -> DecoderSpec:
        return super().spec(
            layer_norm=True,
            norm_eps=self.layer_norm_eps,
            hidden_dropout=self.hidden_dropout,
            parallel=self.use_parallel_residual,
        )


class GPTNeoXAttention(DecoderAttention):
    """One weight, ``query_key_value``: for each head its query, its key and its value."""

    def add_projections(self, spec: DecoderSpec) -> None:
        self.heads, self.size = spec.heads, spec.head_size
        self.query_key_value = Linear(spec.width, 3 * spec.width, spec.qkv_bias)
        self.dense = Linear(spec.width, spec.width, spec.output_bias)

    def projected(self, hidden):
        batch, length, width = hidden.shape
        heads = self.query_key_value(hidden).reshape((batch, length, self.heads, 3 * self.size))
        query, key = heads[..., : self.size], heads[..., self.size : 2 * self.size]
        value, shape = heads[..., 2 * self.size :], (batch, length, width)
        return query.reshape(shape), key.reshape(shape), value.reshape(shape)

    def output(self, mixed):
        return self.dense(mixed)


class GPTNeoXMLP(nn.Cell):
    """The feed-forward half."""

    def __init__(self, spec: DecoderSpec):
        super().__init__()
        self.dense_h_to_4h = Linear(spec.width, spec.inner_width)
        self.dense_4h_to_h = Linear(spec.inner_width, spec.width)
        self.activation = activation(spec.activation)

    def construct(self, hidden):
        return self.dense_4h_to_h(self.activation(self.dense_h_to_4h(hidden)))


class GPTNeoXLayer(nn.Cell):
    """Attention and feed-forward, both of what came in, or one after the other."""

    def __init__(self, spec: DecoderSpec, layer: int):
        super().__init__()
        self.input_layernorm = spec.norm()
        self.post_attention_layernorm = spec.norm()
        self.attention = GPTNeoXAttention(spec, layer)
        self.mlp = GPTNeoXMLP(spec)
        self.dropout = dropout(spec.hidden_dropout)
        self.parallel = spec.parallel

    def construct(self, hidden, mask, angles, place=None):
        mixed = self.dropout(self.attention(self.input_layernorm(hidden), mask, angles, place))
        if self.parallel:
            normed, attended = self.post_attention_layernorm(hidden), hidden + mixed
        else:
            normed, attended = norm_and_sum(self.post_attention_layernorm, mixed, hidden)
        return attended + self.dropout(self.mlp(normed))


class GPTNeoXModel(DecoderModel):
    """The stack of layers: features."""

    config_class = GPTNeoXConfig
    base_model_prefix = "gpt_neox"
    layer_class = GPTNeoXLayer
    embedding_name, norm_name = "embed_in", "final_layer_norm"

    def __init__(self, config: GPTNeoXConfig):
        super().__init__(config)
        self.emb_dropout = dropout(config.hidden_dropout)

    def embedded(self, words, position_ids):
        return self.emb_dropout(words)


class GPTNeoXForCausalLM(DecoderForCausalLM):
    """The next token."""

    config_class = GPTNeoXConfig
    base_model_prefix = "gpt_neox"
    backbone = GPTNeoXModel
    head_name = "embed_out"


class GPTNeoXForSequenceClassification(DecoderForSequenceClassification):
    """Labels of a whole text."""

    config_class = GPTNeoXConfig
    base_model_prefix = "gpt_neox"
    backbone = GPTNeoXModel


class GPTNeoXForTokenClassification(DecoderForTokenClassification):
    """A class for each token."""

    config_class = GPTNeoXConfig
    base_model_prefix = "gpt_neox"
    backbone = GPTNeoXModel
    head_name = "classifier"


HEADS = {
    "AutoModel": GPTNeoXModel,
    "AutoModelForCausalLM": GPTNeoXForCausalLM,
    "AutoModelForSequenceClassification": GPTNeoXForSequenceClassification,
    "AutoModelForTokenClassification": GPTNeoXForTokenClassification,
}
