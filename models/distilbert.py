"""DistilBERT (Sanh et al., 2019): BERT without token types and pooler, under other names."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import mindspore as ms
import mindspore.nn as nn
from mindspore import Tensor, ops

from mindpeft.errors import InputError
from mindpeft.models.config import PretrainedConfig
from mindpeft.models.pretrained import PreTrainedModel
from mindpeft.nn import Embedding, LayerNorm, Linear, norm_of_sum
from mindpeft.nn.encoder import EncoderStack
from mindpeft.ops.activations import activation
from mindpeft.ops.attention import AdditiveMask, Attention, SplitHeads
from mindpeft.ops.checks import check_length
from mindpeft.ops.dropout import dropout
from mindpeft.ops.losses import classification_loss, cross_entropy, span_loss

_EPS = 1e-12


@dataclass
class DistilBertConfig(PretrainedConfig):
    """Keys of a DistilBERT ``config.json``, with Hugging Face's defaults (distilbert-base-uncased)."""

    model_type: ClassVar[str] = "distilbert"

    vocab_size: int = 30522
    max_position_embeddings: int = 512
    n_layers: int = 6
    n_heads: int = 12
    dim: int = 768
    hidden_dim: int = 3072
    dropout: float = 0.1
    attention_dropout: float = 0.1
    activation: str = "gelu"
    initializer_range: float = 0.02
    qa_dropout: float = 0.1
    seq_classif_dropout: float = 0.2
    pad_token_id: int | None = 0
    tie_word_embeddings: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.dim % self.n_heads:
            raise InputError(f"dim {self.dim} is no multiple of n_heads {self.n_heads}")

    @property
    def hidden_size(self) -> int:
        return self.dim

    @property
    def num_hidden_layers(self) -> int:
        return self.n_layers

    @property
    def num_attention_heads(self) -> int:
        return self.n_heads


class DistilBertEmbeddings(nn.Cell):
    """Sum of word and position embeddings, normalised."""

    def __init__(self, config: DistilBertConfig):
        super().__init__()
        self.word_embeddings = Embedding(config.vocab_size, config.dim, config.pad_token_id)
        self.position_embeddings = Embedding(config.max_position_embeddings, config.dim)
        self.LayerNorm = LayerNorm(config.dim, _EPS)
        self.dropout = dropout(config.dropout)
        self.positions = Tensor(list(range(config.max_position_embeddings)), ms.int32)

    def construct(self, input_ids, position_ids=None, inputs_embeds=None):
        words = self.word_embeddings(input_ids) if inputs_embeds is None else inputs_embeds
        if position_ids is None:
            length = check_length(words.shape[1], self.positions.shape[0])
            position_ids = ops.tile(self.positions[:length].reshape((1, length)), (words.shape[0], 1))
        return self.dropout(norm_of_sum(self.LayerNorm, words, self.position_embeddings(position_ids)))


class DistilBertSelfAttention(nn.Cell):
    """The attention half of a layer."""

    def __init__(self, config: DistilBertConfig):
        super().__init__()
        self.q_lin = Linear(config.dim, config.dim)
        self.k_lin = Linear(config.dim, config.dim)
        self.v_lin = Linear(config.dim, config.dim)
        self.out_lin = Linear(config.dim, config.dim)
        self.split_heads = SplitHeads(config.n_heads)
        self.attention = Attention(config.n_heads, config.dim // config.n_heads, config.attention_dropout)

    def construct(self, hidden, mask=None, queries=None):
        query = self.split_heads(self.q_lin(hidden if queries is None else queries))
        key = self.split_heads(self.k_lin(hidden))
        value = self.split_heads(self.v_lin(hidden))
        return self.out_lin(self.attention(query, key, value, mask))


class FFN(nn.Cell):
    """The feed-forward half of a layer."""

    def __init__(self, config: DistilBertConfig):
        super().__init__()
        self.lin1 = Linear(config.dim, config.hidden_dim)
        self.lin2 = Linear(config.hidden_dim, config.dim)
        self.activation = activation(config.activation)
        self.dropout = dropout(config.dropout)

    def construct(self, hidden):
        return self.dropout(self.lin2(self.activation(self.lin1(hidden))))


class TransformerBlock(nn.Cell):
    """One encoder layer, as `EncoderStack` calls it."""

    def __init__(self, config: DistilBertConfig):
        super().__init__()
        self.attention = DistilBertSelfAttention(config)
        self.sa_layer_norm = LayerNorm(config.dim, _EPS)
        self.ffn = FFN(config)
        self.output_layer_norm = LayerNorm(config.dim, _EPS)

    def construct(self, hidden, mask=None, queries=None):
        residual = hidden if queries is None else queries
        hidden = norm_of_sum(self.sa_layer_norm, self.attention(hidden, mask, queries), residual)
        return norm_of_sum(self.output_layer_norm, self.ffn(hidden), hidden)


class Transformer(EncoderStack):
    """The stack of layers."""

    def __init__(self, config: DistilBertConfig):
        super().__init__(TransformerBlock(config) for _ in range(config.n_layers))


class DistilBertPreTrainedModel(PreTrainedModel):
    """What all DistilBERT classes share."""

    config_class = DistilBertConfig
    base_model_prefix = "distilbert"
    ignored_on_load = (r"embeddings\.position_ids$",)

    def get_input_embeddings(self) -> nn.Cell:
        """Return the word embedding."""
        return getattr(self, self.base_model_prefix, self).embeddings.word_embeddings


class DistilBertModel(DistilBertPreTrainedModel):
    """The encoder: features."""

    def __init__(self, config: DistilBertConfig):
        super().__init__(config)
        self.embeddings = DistilBertEmbeddings(config)
        self.transformer = Transformer(config)
        self.additive_mask = AdditiveMask(config.n_heads)

    def construct(
        self,
        input_ids,
        attention_mask=None,
        position_ids=None,
        inputs_embeds=None,
        output_hidden_states=False,
        first_only=False,
    ):
        """Return the hidden states (batch, length, dim); the arguments are those of BERT's model."""
        hidden = self.embeddings(input_ids, position_ids, inputs_embeds)
        length = hidden.shape[1]
        mask = None if attention_mask is None else self.additive_mask(attention_mask, length, hidden.dtype)
        states = self.transformer(hidden, mask, first_only)
        return (states[-1], states) if output_hidden_states else states[-1]


class DistilBertForSequenceClassification(DistilBertPreTrainedModel):
    """Classes, several labels at once, or numbers for a whole text: ``config.problem_type`` says which."""

    def __init__(self, config: DistilBertConfig):
        super().__init__(config)
        self.distilbert = DistilBertModel(config)
        self.distilbert.transformer.set_last_apart()
        self.pre_classifier = Linear(config.dim, config.dim)
        self.classifier = Linear(config.dim, config.num_labels)
        self.dropout = dropout(config.seq_classif_dropout)
        self.relu = nn.ReLU()

    def construct(
        self,
        input_ids,
        attention_mask=None,
        position_ids=None,
        labels=None,
        example_mask=None,
        inputs_embeds=None,
    ):
        """The arguments are those of BERT's classifier."""
        hidden = self.distilbert(input_ids, attention_mask, position_ids, inputs_embeds, first_only=True)
        pooled = self.relu(self.pre_classifier(hidden[:, 0]))
        logits = self.classifier(self.dropout(pooled))
        if labels is None:
            return logits
        return classification_loss(logits, labels, self.config.problem_type, example_mask), logits


class DistilBertTokenModel(DistilBertPreTrainedModel):
    """What the models with an output for each token share; they define ``scores`` and ``loss``."""

    def __init__(self, config: DistilBertConfig):
        super().__init__(config)
        self.distilbert = DistilBertModel(config)

    def construct(self, input_ids, attention_mask=None, position_ids=None, labels=None, inputs_embeds=None):
        """Return logits, or ``(loss, logits)`` with labels."""
        logits = self.scores(self.distilbert(input_ids, attention_mask, position_ids, inputs_embeds))
        return logits if labels is None else (self.loss(logits, labels), logits)

    def loss(self, logits, labels):
        return cross_entropy(logits, labels)


class DistilBertForTokenClassification(DistilBertTokenModel):
    """A class for each token: logits (batch, length, num_labels), labels (batch, length), -100 left out."""

    def __init__(self, config: DistilBertConfig):
        super().__init__(config)
        self.dropout = dropout(config.dropout)
        self.classifier = Linear(config.dim, config.num_labels)

    def scores(self, hidden):
        return self.classifier(self.dropout(hidden))


class DistilBertForQuestionAnswering(DistilBertTokenModel):
    """First and last token of an answer: logits (batch, length, 2), labels (batch, 2), the two positions."""

    def __init__(self, config: DistilBertConfig):
        super().__init__(config)
        self.dropout = dropout(config.qa_dropout)
        self.qa_outputs = Linear(config.dim, 2)

    def scores(self, hidden):
        return self.qa_outputs(self.dropout(hidden))

    def loss(self, logits, labels):
        return span_loss(logits, labels)


class DistilBertForMaskedLM(DistilBertTokenModel):
    """Masked tokens: logits (batch, length, vocab_size), labels (batch, length), -100 left out."""

    def __init__(self, config: DistilBertConfig):
        super().__init__(config)
        self.activation = activation(config.activation)
        self.vocab_transform = Linear(config.dim, config.dim)
        self.vocab_layer_norm = LayerNorm(config.dim, _EPS)
        self.vocab_projector = Linear(config.dim, config.vocab_size)
        if config.tie_word_embeddings:
            self.vocab_projector.weight = self.get_input_embeddings().weight

    def scores(self, hidden):
        transformed = self.vocab_layer_norm(self.activation(self.vocab_transform(hidden)))
        return self.vocab_projector(transformed)

    def get_output_embeddings(self) -> nn.Cell:
        """Return the projection to the vocabulary, which ``target_modules="all-linear"`` leaves out."""
        return self.vocab_projector


HEADS = {
    "AutoModel": DistilBertModel,
    "AutoModelForSequenceClassification": DistilBertForSequenceClassification,
    "AutoModelForTokenClassification": DistilBertForTokenClassification,
    "AutoModelForQuestionAnswering": DistilBertForQuestionAnswering,
    "AutoModelForMaskedLM": DistilBertForMaskedLM,
}
