"""GPT-2 (Radford et al., 2019): learned positions, weights the other way round."""

from __future__ import annotations

from dataclasses import dataclass

import mindspore.nn as nn
from mindspore import ops

from mindpeft.errors import InputError
from mindpeft.models.decoder import (
    DecoderForCausalLM,
    DecoderForSequenceClassification,
    DecoderForTokenClassification,
    DecoderModel,
)
from mindpeft.models.decoder_config import AnyDecoderConfig
from mindpeft.nn import Conv1D, Embedding, norm_and_sum
from mindpeft.nn.decoder import DecoderAttention, DecoderSpec
from mindpeft.ops.activations import activation
from mindpeft.ops.checks import check_length
from mindpeft.ops.dropout import dropout


@dataclass
class GPT2Config(AnyDecoderConfig):
    """Keys of a GPT-2 ``config.json``, with Hugging Face's defaults."""

    model_type = "gpt2"

    vocab_size: int = 50257
    n_positions: int = 1024
    n_embd: int = 768
    n_layer: int = 12
    n_head: int = 12
    n_inner: int | None = None
    activation_function: str = "gelu_new"
    resid_pdrop: float = 0.1
    embd_pdrop: float = 0.1
    attn_pdrop: float = 0.1
    layer_norm_epsilon: float = 1e-5
    initializer_range: float = 0.02
    scale_attn_weights: bool = True
    scale_attn_by_inverse_layer_idx: bool = False
    pad_token_id: int | None = None
    bos_token_id: int | None = 50256
    eos_token_id: int | list[int] | None = 50256
    tie_word_embeddings: bool = True
    classifier_dropout: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.n_embd % self.n_head:
            raise InputError(f"n_embd {self.n_embd} is no multiple of n_head {self.n_head}")
        if self.extra.get("add_cross_attention"):
            raise InputError("add_cross_attention is true, but only decoders alone are supported")

    @property
    def hidden_size(self) -> int:
        return self.n_embd

    @property
    def num_hidden_layers(self) -> int:
        return self.n_layer

    @property
    def num_attention_heads(self) -> int:
        return self.n_head

    @property
    def max_position_embeddings(self) -> int:
        return self.n_positions

    def spec(self) -> DecoderSpec:
        return DecoderSpec(
            layers=self.n_layer,
            width=self.n_embd,
            heads=self.n_head,
            key_heads=self.n_head,
            head_size=self.n_embd // self.n_head,
            inner_width=self.n_inner or 4 * self.n_embd,
            activation=self.activation_function,
            layer_norm=True,
            norm_eps=self.layer_norm_epsilon,
            attention_dropout=self.attn_pdrop,
            hidden_dropout=self.resid_pdrop,
            score_scale=None if self.scale_attn_weights else 1.0,
            scale_by_layer=self.scale_attn_by_inverse_layer_idx,
            **self.windows(None),
        )


class GPT2Attention(DecoderAttention):
    """One weight for queries, keys and values."""

    def add_projections(self, spec: DecoderSpec) -> None:
        self.c_attn = Conv1D(spec.width, 3 * spec.width)
        self.c_proj = Conv1D(spec.width, spec.width)
        self.split = ops.Split(-1, 3)

    def projected(self, hidden):
        return self.split(self.c_attn(hidden))

    def output(self, mixed):
        return self.c_proj(mixed)


class GPT2MLP(nn.Cell):
    """The feed-forward half."""

    def __init__(self, spec: DecoderSpec):
        super().__init__()
        self.c_fc = Conv1D(spec.width, spec.inner_width)
        self.c_proj = Conv1D(spec.inner_width, spec.width)
        self.activation = activation(spec.activation)

    def construct(self, hidden):
        return self.c_proj(self.activation(self.c_fc(hidden)))


class GPT2Block(nn.Cell):
    """Attention and feed-forward, each behind a norm and added to what came in."""

    def __init__(self, spec: DecoderSpec, layer: int):
        super().__init__()
        self.ln_1 = spec.norm()
        self.attn = GPT2Attention(spec, layer)
        self.ln_2 = spec.norm()
        self.mlp = GPT2MLP(spec)
        self.dropout = dropout(spec.hidden_dropout)

    def construct(self, hidden, mask, angles, place=None):
        mixed = self.dropout(self.attn(self.ln_1(hidden), mask, angles, place))
        normed, hidden = norm_and_sum(self.ln_2, mixed, hidden)
        return hidden + self.dropout(self.mlp(normed))


class GPT2Model(DecoderModel):
    """The stack of layers: features."""

    config_class = GPT2Config
    base_model_prefix = "transformer"
    layer_class = GPT2Block
    embedding_name, layers_name, norm_name = "wte", "h", "ln_f"
    ignored_on_load = (r"attn\.(masked_)?bias$",)

    def __init__(self, config: GPT2Config):
        super().__init__(config)
        self.wpe = Embedding(config.n_positions, config.n_embd)
        self.drop = dropout(config.embd_pdrop)

    def embedded(self, words, position_ids):
        check_length(words.shape[1], self.config.n_positions)
        return self.drop(words + self.wpe(position_ids))


class GPT2ForCausalLM(DecoderForCausalLM):
    """The next token."""

    config_class = GPT2Config
    base_model_prefix = "transformer"
    backbone = GPT2Model


class GPT2ForSequenceClassification(DecoderForSequenceClassification):
    """Labels of a whole text."""

    config_class = GPT2Config
    base_model_prefix = "transformer"
    backbone = GPT2Model


class GPT2ForTokenClassification(DecoderForTokenClassification):
    """A class for each token."""

    config_class = GPT2Config
    base_model_prefix = "transformer"
    backbone = GPT2Model
    head_name = "classifier"


HEADS = {
    "AutoModel": GPT2Model,
    "AutoModelForCausalLM": GPT2ForCausalLM,
    "AutoModelForSequenceClassification": GPT2ForSequenceClassification,
    "AutoModelForTokenClassification": GPT2ForTokenClassification,
}
