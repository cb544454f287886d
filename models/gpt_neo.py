"""GPT-Neo (Black et al., 2021): GPT-2 with windows in every other layer and scores that are not scaled."""

from __future__ import annotations

from dataclasses import dataclass, field

import mindspore.nn as nn

from mindpeft.errors import InputError
from mindpeft.models.decoder import (
    DecoderForCausalLM,
    DecoderForSequenceClassification,
    DecoderForTokenClassification,
    DecoderModel,
)
from mindpeft.models.decoder_config import FULL, SLIDING, AnyDecoderConfig
from mindpeft.nn import Embedding, Linear, norm_and_sum
from mindpeft.nn.decoder import DecoderAttention, DecoderSpec
from mindpeft.ops.activations import activation
from mindpeft.ops.checks import check_length
from mindpeft.ops.dropout import dropout


@dataclass
class GPTNeoConfig(AnyDecoderConfig):
    """Keys of a GPT-Neo ``config.json``, with Hugging Face's defaults."""

    model_type = "gpt_neo"

    vocab_size: int = 50257
    max_position_embeddings: int = 2048
    hidden_size: int = 2048
    num_layers: int = 24
    attention_types: list = field(default_factory=lambda: [[["global", "local"], 12]])
    num_heads: int = 16
    intermediate_size: int | None = None
    window_size: int = 256
    activation_function: str = "gelu_new"
    resid_dropout: float = 0.0
    embed_dropout: float = 0.0
    attention_dropout: float = 0.0
    classifier_dropout: float | None = 0.1
    layer_norm_epsilon: float = 1e-5
    initializer_range: float = 0.02
    pad_token_id: int | None = None
    bos_token_id: int | None = 50256
    eos_token_id: int | list[int] | None = 50256
    tie_word_embeddings: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.hidden_size % self.num_heads:
            raise InputError(f"hidden_size {self.hidden_size} is no multiple of num_heads {self.num_heads}")
        self.kinds_of_layers()

    @property
    def num_hidden_layers(self) -> int:
        return self.num_layers

    @property
    def num_attention_heads(self) -> int:
        return self.num_heads

    def kinds_of_layers(self) -> list[str]:
        known = {"global": FULL, "local": SLIDING}
        try:
            kinds = [known[name] for names, times in self.attention_types for name in names * times]
        except (KeyError, TypeError, ValueError):
            kinds = []
        if len(kinds) != self.num_layers:
            raise InputError(
                "attention_types must be lists of names ('global', 'local') with a count, for "
                f"{self.num_layers} layers in all, not {self.attention_types!r}"
            )
        return kinds

    def spec(self) -> DecoderSpec:
        return DecoderSpec(
            layers=self.num_layers,
            width=self.hidden_size,
            heads=self.num_heads,
            key_heads=self.num_heads,
            head_size=self.hidden_size // self.num_heads,
            inner_width=self.intermediate_size or 4 * self.hidden_size,
            activation=self.activation_function,
            layer_norm=True,
            norm_eps=self.layer_norm_epsilon,
            output_bias=True,
            attention_dropout=self.attention_dropout,
            hidden_dropout=self.resid_dropout,
            score_scale=1.0,
            **self.windows(self.window_size),
        )


class GPTNeoSelfAttention(DecoderAttention):
    """Attention that ends in ``out_proj``."""

    output_name = "out_proj"


class GPTNeoAttention(nn.Cell):
    """Holds the attention under the name that checkpoints give it."""

    def __init__(self, spec: DecoderSpec, layer: int):
        super().__init__()
        self.attention = GPTNeoSelfAttention(spec, layer)

    def construct(self, hidden, mask, angles, place=None):
        return self.attention(hidden, mask, angles, place)


class GPTNeoMLP(nn.Cell):
    """The feed-forward half."""

    def __init__(self, spec: DecoderSpec):
        super().__init__()
        self.c_fc = Linear(spec.width, spec.inner_width)
        self.c_proj = Linear(spec.inner_width, spec.width)
        self.activation = activation(spec.activation)

    def construct(self, hidden):
        return self.c_proj(self.activation(self.c_fc(hidden)))


class GPTNeoBlock(nn.Cell):
    """Attention and feed-forward, each behind a norm and added to what came in."""

    def __init__(self, spec: DecoderSpec, layer: int):
        super().__init__()
        self.ln_1 = spec.norm()
        self.attn = GPTNeoAttention(spec, layer)
        self.ln_2 = spec.norm()
        self.mlp = GPTNeoMLP(spec)
        self.dropout = dropout(spec.hidden_dropout)

    def construct(self, hidden, mask, angles, place=None):
        mixed = self.dropout(self.attn(self.ln_1(hidden), mask, angles, place))
        normed, hidden = norm_and_sum(self.ln_2, mixed, hidden)
        return hidden + self.dropout(self.mlp(normed))


class GPTNeoModel(DecoderModel):
    """The stack of layers: features."""

    config_class = GPTNeoConfig
    base_model_prefix = "transformer"
    layer_class = GPTNeoBlock
    embedding_name, layers_name, norm_name = "wte", "h", "ln_f"
    ignored_on_load = (r"attention\.(masked_)?bias$",)

    def __init__(self, config: GPTNeoConfig):
        super().__init__(config)
        self.wpe = Embedding(config.max_position_embeddings, config.hidden_size)
        self.drop = dropout(config.embed_dropout)

    def embedded(self, words, position_ids):
        check_length(words.shape[1], self.config.max_position_embeddings)
        return self.drop(words + self.wpe(position_ids))


class GPTNeoForCausalLM(DecoderForCausalLM):
    """The next token."""

    config_class = GPTNeoConfig
    base_model_prefix = "transformer"
    backbone = GPTNeoModel


class GPTNeoForSequenceClassification(DecoderForSequenceClassification):
    """Labels of a whole text."""

    config_class = GPTNeoConfig
    base_model_prefix = "transformer"
    backbone = GPTNeoModel


class GPTNeoForTokenClassification(DecoderForTokenClassification):
    """A class for each token."""

    config_class = GPTNeoConfig
    base_model_prefix = "transformer"
    backbone = GPTNeoModel
    head_name = "classifier"


HEADS = {
    "AutoModel": GPTNeoModel,
    "AutoModelForCausalLM": GPTNeoForCausalLM,
    "AutoModelForSequenceClassification": GPTNeoForSequenceClassification,
    "AutoModelForTokenClassification": GPTNeoForTokenClassification,
}
