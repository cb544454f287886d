"""ChatGLM2, ChatGLM3 and GLM-4 in their authors' layout (Zeng et al., 2024), loaded without their code."""

from __future__ import annotations

from dataclasses import dataclass

import mindspore.nn as nn

from mindpeft.errors import InputError
from mindpeft.models.decoder import (
    DecoderForCausalLM,
    DecoderForSequenceClassification,
    DecoderModel,
    DecoderPreTrainedModel,
)
from mindpeft.models.decoder_config import AnyDecoderConfig
from mindpeft.nn import Embedding, Linear
from mindpeft.nn.decoder import DecoderLayer, DecoderSpec, JoinedAttention, JoinedMLP, LayerStack
from mindpeft.nn.rotary import RotarySpec


@dataclass
class ChatGLMConfig(AnyDecoderConfig):
    """Keys of a ChatGLM ``config.json``, with ChatGLM3's values for defaults."""

    model_type = "chatglm"

    num_layers: int = 28
    padded_vocab_size: int = 65024
    hidden_size: int = 4096
    ffn_hidden_size: int = 13696
    kv_channels: int = 128
    num_attention_heads: int = 32
    seq_length: int = 8192
    hidden_dropout: float = 0.0
    attention_dropout: float = 0.0
    layernorm_epsilon: float = 1e-5
    rmsnorm: bool = True
    post_layer_norm: bool = True
    apply_residual_connection_post_layernorm: bool = False
    add_bias_linear: bool = False
    add_qkv_bias: bool = True
    multi_query_attention: bool = True
    multi_query_group_num: int = 2
    rope_ratio: float = 1.0
    initializer_range: float = 0.02
    pad_token_id: int | None = 0
    eos_token_id: int | list[int] | None = 2
    tie_word_embeddings: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        heads, groups = self.num_attention_heads, self.multi_query_group_num
        if self.multi_query_attention and heads % groups:
            raise InputError(f"num_attention_heads {heads} is no multiple of multi_query_group_num {groups}")
        if self.apply_residual_connection_post_layernorm:
            raise InputError("apply_residual_connection_post_layernorm is true, which is not supported")
        if self.extra.get("pre_seq_len") is not None:
            raise InputError("pre_seq_len is set; use a prefix tuning adapter instead")

    @property
    def vocab_size(self) -> int:
        return self.padded_vocab_size

    @property
    def num_hidden_layers(self) -> int:
        return self.num_layers

    @property
    def num_key_value_heads(self) -> int:
        return self.multi_query_group_num if self.multi_query_attention else self.num_attention_heads

    @property
    def head_dim(self) -> int:
        return self.kv_channels

    @property
    def max_position_embeddings(self) -> int:
        return self.seq_length

    def spec(self) -> DecoderSpec:
        rotary = RotarySpec(
            size=self.kv_channels // 2,
            theta=10000.0 * self.rope_ratio,
            max_positions=self.seq_length,
            interleaved=True,
        )
        return DecoderSpec(
            layers=self.num_layers,
            width=self.hidden_size,
            heads=self.num_attention_heads,
            key_heads=self.num_key_value_heads,
            head_size=self.kv_channels,
            inner_width=self.ffn_hidden_size,
            activation="silu",
            rotary=(rotary,),
            rotary_of=(0,) * self.num_layers,
            layer_norm=not self.rmsnorm,
            norm_eps=self.layernorm_epsilon,
            final_norm=self.post_layer_norm,
            qkv_bias=self.add_bias_linear or self.add_qkv_bias,
            output_bias=self.add_bias_linear,
            mlp_bias=self.add_bias_linear,
            attention_dropout=self.attention_dropout,
            hidden_dropout=self.hidden_dropout,
            **self.windows(None),
        )


class ChatGLMAttention(JoinedAttention):
    """Attention under ChatGLM's names."""

    joined_name, output_name = "query_key_value", "dense"


class ChatGLMMLP(JoinedMLP):
    """The feed-forward half under ChatGLM's names."""

    joined_name, output_name = "dense_h_to_4h", "dense_4h_to_h"


class ChatGLMBlock(DecoderLayer):
    """A layer under ChatGLM's names."""

    attention_name = "self_attention"
    attention_class = ChatGLMAttention
    mlp_class = ChatGLMMLP


class ChatGLMEmbedding(nn.Cell):
    """Holds the word embedding under the name that checkpoints give it."""

    def __init__(self, config: ChatGLMConfig):
        super().__init__()
        self.word_embeddings = Embedding(config.vocab_size, config.hidden_size)

    def construct(self, input_ids):
        return self.word_embeddings(input_ids)


class ChatGLMEncoder(LayerStack):
    """Holds the layers under the name that checkpoints give them."""

    norm_name = "final_layernorm"

    def __init__(self, config: ChatGLMConfig):
        super().__init__()
        self.add_layers(config.spec(), ChatGLMBlock)

    def construct(self, hidden, attention_mask, position_ids, place=None):
        return self.through(hidden, attention_mask, position_ids, place)


class ChatGLMModel(DecoderModel):
    """The stack of layers: features."""

    config_class = ChatGLMConfig
    base_model_prefix = "transformer"
    ignored_on_load = (r"rotary_pos_emb\.inv_freq$",)
    embedding_name = "embedding"

    def __init__(self, config: ChatGLMConfig):
        DecoderPreTrainedModel.__init__(self, config)
        self.embedding = ChatGLMEmbedding(config)
        self.encoder = ChatGLMEncoder(config)
        self.output_layer = None

    def through(self, hidden, attention_mask, position_ids, place=None):
        return self.encoder(hidden, attention_mask, position_ids, place)

    def get_input_embeddings(self) -> nn.Cell:
        return self.embedding.word_embeddings


class ChatGLMForConditionalGeneration(DecoderForCausalLM):
    """The next token."""

    config_class = ChatGLMConfig
    base_model_prefix = "transformer"
    ignored_on_load = ChatGLMModel.ignored_on_load
    backbone = ChatGLMModel

    def add_head(self, head: Linear) -> None:
        self.transformer.output_layer = head

    def projection(self):
        return self.transformer.output_layer

    def head(self, hidden):
        return self.transformer.output_layer(hidden)


class ChatGLMForSequenceClassification(DecoderForSequenceClassification):
    """Labels of a whole text."""

    config_class = ChatGLMConfig
    base_model_prefix = "transformer"
    ignored_on_load = (*ChatGLMModel.ignored_on_load, r"output_layer\.weight$")
    backbone = ChatGLMModel
    head_name = "classifier_head"
    head_bias = True


HEADS = {
    "AutoModel": ChatGLMModel,
    "AutoModelForCausalLM": ChatGLMForConditionalGeneration,
    "AutoModelForSequenceClassification": ChatGLMForSequenceClassification,
}
