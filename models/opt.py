"""OPT (Zhang et al., 2022): learned positions that count the tokens, norms before or behind each half."""

from __future__ import annotations

from dataclasses import dataclass

import mindspore as ms
import mindspore.nn as nn
from mindspore import ops

from mindpeft.errors import InputError
from mindpeft.models.decoder import (
    DecoderForCausalLM,
    DecoderForSequenceClassification,
    DecoderModel,
    DecoderPreTrainedModel,
)
from mindpeft.models.decoder_config import AnyDecoderConfig
from mindpeft.nn import Embedding, Linear, norm_and_sum, norm_of_sum
from mindpeft.nn.decoder import DecoderAttention, DecoderSpec
from mindpeft.ops.activations import activation
from mindpeft.ops.checks import check_length
from mindpeft.ops.dropout import dropout

_OFFSET = 2  # rows of the position table before that of the first token


@dataclass
class OPTConfig(AnyDecoderConfig):
    """Keys of an OPT ``config.json``, with Hugging Face's defaults; ``layerdrop`` is not applied."""

    model_type = "opt"

    vocab_size: int = 50272
    hidden_size: int = 768
    num_hidden_layers: int = 12
    ffn_dim: int = 3072
    max_position_embeddings: int = 2048
    do_layer_norm_before: bool = True
    word_embed_proj_dim: int | None = None
    dropout: float = 0.1
    attention_dropout: float = 0.0
    num_attention_heads: int = 12
    activation_function: str = "relu"
    init_std: float = 0.02
    pad_token_id: int | None = 1
    bos_token_id: int | None = 2
    eos_token_id: int | list[int] | None = 2
    enable_bias: bool = True
    layer_norm_elementwise_affine: bool = True
    tie_word_embeddings: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        heads = self.num_attention_heads
        if self.hidden_size % heads:
            raise InputError(f"hidden_size {self.hidden_size} is no multiple of num_attention_heads {heads}")

    @property
    def initializer_range(self) -> float:
        return self.init_std

    @property
    def word_size(self) -> int:
        return self.word_embed_proj_dim or self.hidden_size

    @property
    def feature_size(self) -> int:
        return self.word_size

    def spec(self) -> DecoderSpec:
        removed = self.extra.get("_remove_final_layer_norm", False)
        return DecoderSpec(
            layers=self.num_hidden_layers,
            width=self.hidden_size,
            heads=self.num_attention_heads,
            key_heads=self.num_attention_heads,
            head_size=self.hidden_size // self.num_attention_heads,
            inner_width=self.ffn_dim,
            activation=self.activation_function,
            layer_norm=True,
            norm_eps=1e-5,
            norm_affine=self.layer_norm_elementwise_affine,
            norm_behind=not self.do_layer_norm_before,
            final_norm=self.do_layer_norm_before and not removed,
            qkv_bias=self.enable_bias,
            output_bias=self.enable_bias,
            mlp_bias=self.enable_bias,
            attention_dropout=self.attention_dropout,
            hidden_dropout=self.dropout,
            **self.windows(None),
        )


class OPTAttention(DecoderAttention):
    """Attention that ends in ``out_proj``."""

    output_name = "out_proj"


class OPTDecoderLayer(nn.Cell):
    """Attention and feed-forward, each with a norm before or behind it."""

    def __init__(self, spec: DecoderSpec, layer: int):
        super().__init__()
        self.self_attn = OPTAttention(spec, layer)
        self.self_attn_layer_norm = spec.norm()
        self.fc1 = Linear(spec.width, spec.inner_width, spec.mlp_bias)
        self.fc2 = Linear(spec.inner_width, spec.width, spec.mlp_bias)
        self.final_layer_norm = spec.norm()
        self.activation = activation(spec.activation)
        self.dropout = dropout(spec.hidden_dropout)
        self.norm_behind = spec.norm_behind

    def construct(self, hidden, mask, angles, place=None):
        if self.norm_behind:
            mixed = self.attended(hidden, mask, angles, place)
            hidden = norm_of_sum(self.self_attn_layer_norm, mixed, hidden)
            return norm_of_sum(self.final_layer_norm, self.fed_forward(hidden), hidden)
        mixed = self.attended(self.self_attn_layer_norm(hidden), mask, angles, place)
        normed, hidden = norm_and_sum(self.final_layer_norm, mixed, hidden)
        return hidden + self.fed_forward(normed)

    def attended(self, hidden, mask, angles, place):
        """The attention half without norm and residual."""
        return self.dropout(self.self_attn(hidden, mask, angles, place))

    def fed_forward(self, hidden):
        """The feed-forward half without norm and residual."""
        return self.dropout(self.fc2(self.activation(self.fc1(hidden))))


class OPTDecoder(DecoderModel):
    """The stack of layers."""

    config_class = OPTConfig
    layer_class = OPTDecoderLayer
    norm_name = "final_layer_norm"

    def __init__(self, config: OPTConfig):
        super().__init__(config)
        width, words = config.hidden_size, config.word_size
        self.embed_positions = Embedding(config.max_position_embeddings + _OFFSET, width)
        self.project_in = None if width == words else Linear(words, width, bias=False)
        self.project_out = None if width == words else Linear(width, words, bias=False)

    def positions(self, attention_mask, batch, length):
        if attention_mask is None or attention_mask.ndim != 2:
            return super().positions(attention_mask, batch, length)
        real = (attention_mask != 0).astype(ms.float32)
        return (ops.cumsum(real, 1) * real - 1).astype(ms.int32)

    def embedded(self, words, position_ids):
        check_length(words.shape[1], self.config.max_position_embeddings)
        hidden = words if self.project_in is None else self.project_in(words)
        return hidden + self.embed_positions(position_ids + _OFFSET)

    def through(self, hidden, attention_mask, position_ids, place=None):
        hidden, states = super().through(hidden, attention_mask, position_ids, place)
        return hidden if self.project_out is None else self.project_out(hidden), states


class OPTModel(DecoderPreTrainedModel):
    """Holds the stack of layers under the name that checkpoints give it: features."""

    config_class = OPTConfig

    def __init__(self, config: OPTConfig):
        super().__init__(config)
        self.decoder = OPTDecoder(config)

    def construct(
        self,
        input_ids,
        attention_mask=None,
        position_ids=None,
        inputs_embeds=None,
        place=None,
        output_hidden_states=False,
    ):
        """The arguments are those of `DecoderModel`."""
        return self.decoder(
            input_ids, attention_mask, position_ids, inputs_embeds, place, output_hidden_states
        )

    def get_input_embeddings(self) -> nn.Cell:
        return self.decoder.embed_tokens


class OPTForCausalLM(DecoderForCausalLM):
    """The next token."""

    config_class = OPTConfig
    backbone = OPTModel


class OPTForSequenceClassification(DecoderForSequenceClassification):
    """Labels of a whole text."""

    config_class = OPTConfig
    backbone = OPTModel


HEADS = {
    "AutoModel": OPTModel,
    "AutoModelForCausalLM": OPTForCausalLM,
    "AutoModelForSequenceClassification": OPTForSequenceClassification,
}
