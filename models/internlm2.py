"""InternLM2 (Cai et al., 2024): Llama with its own names; queries, keys, values joined group by group."""

from __future__ import annotations

from dataclasses import dataclass

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


@dataclass
class InternLM2Config(DecoderConfig):
    """Keys of an InternLM2 ``config.json``, with its authors' defaults."""

    model_type = "internlm2"

    vocab_size: int = 103168
    pad_token_id: int | None = 2
    bias: bool = True

    def spec(self) -> DecoderSpec:
        return super().spec(qkv_bias=self.bias, output_bias=self.bias)


class InternLM2Attention(DecoderAttention):
    """One weight, ``wqkv``: for each group of heads its queries, then its key, then its value."""

    def add_projections(self, spec: DecoderSpec) -> None:
        self.groups, self.size = spec.key_heads, spec.head_size
        self.queries = spec.heads // spec.key_heads * spec.head_size  # columns of a group
        self.wqkv = Linear(spec.width, (spec.heads + 2 * spec.key_heads) * spec.head_size, spec.qkv_bias)
        self.wo = Linear(spec.heads * spec.head_size, spec.width, spec.output_bias)

    def projected(self, hidden):
        batch, length = hidden.shape[:2]
        groups = self.wqkv(hidden).reshape((batch, length, self.groups, -1))
        query, key = groups[..., : self.queries], groups[..., self.queries : -self.size]
        value, shape = groups[..., -self.size :], (batch, length, -1)
        return query.reshape(shape), key.reshape(shape), value.reshape(shape)

    def output(self, mixed):
        return self.wo(mixed)


class InternLM2MLP(nn.Cell):
    """``w2(activation(w1(x)) * w3(x))``."""

    def __init__(self, spec: DecoderSpec):
        super().__init__()
        self.w1 = Linear(spec.width, spec.inner_width, bias=False)
        self.w3 = Linear(spec.width, spec.inner_width, bias=False)
        self.w2 = Linear(spec.inner_width, spec.width, bias=False)
        self.activation = activation(spec.activation)

    def construct(self, hidden):
        return self.w2(self.activation(self.w1(hidden)) * self.w3(hidden))


class InternLM2Layer(nn.Cell):
    """Attention and feed-forward, each behind a norm and added to what came in."""

    def __init__(self, spec: DecoderSpec, layer: int):
        super().__init__()
        self.attention = InternLM2Attention(spec, layer)
        self.feed_forward = InternLM2MLP(spec)
        self.attention_norm = spec.norm()
        self.ffn_norm = spec.norm()

    def construct(self, hidden, mask, angles, place=None):
        mixed = self.attention(self.attention_norm(hidden), mask, angles, place)
        normed, hidden = norm_and_sum(self.ffn_norm, mixed, hidden)
        return hidden + self.feed_forward(normed)


class InternLM2Model(DecoderModel):
    """The stack of layers: features."""

    config_class = InternLM2Config
    layer_class = InternLM2Layer
    embedding_name = "tok_embeddings"


class InternLM2ForCausalLM(DecoderForCausalLM):
    """The next token."""

    config_class = InternLM2Config
    backbone = InternLM2Model
    head_name = "output"


class InternLM2ForSequenceClassification(DecoderForSequenceClassification):
    """Labels of a whole text."""

    config_class = InternLM2Config
    backbone = InternLM2Model


class InternLM2ForTokenClassification(DecoderForTokenClassification):
    """A class for each token."""

    config_class = InternLM2Config
    backbone = InternLM2Model


HEADS = {
    "AutoModel": InternLM2Model,
    "AutoModelForCausalLM": InternLM2ForCausalLM,
    "AutoModelForSequenceClassification": InternLM2ForSequenceClassification,
    "AutoModelForTokenClassification": InternLM2ForTokenClassification,
}
