"""BERT (Devlin et al., 2018): encoder, pooler and task heads, in the names of Hugging Face's checkpoints."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import mindspore as ms
import mindspore.nn as nn
from mindspore import Tensor, ops

from mindpeft.errors import InputError
from mindpeft.models.config import PretrainedConfig
from mindpeft.models.pretrained import PreTrainedModel
from mindpeft.nn import Embedding, LayerNorm, Linear, empty_parameter, norm_of_sum
from mindpeft.nn.encoder import EncoderStack
from mindpeft.ops.activations import activation, tanh
from mindpeft.ops.attention import AdditiveMask, Attention, SplitHeads
from mindpeft.ops.checks import check_length
from mindpeft.ops.dropout import dropout
from mindpeft.ops.losses import classification_loss, cross_entropy, span_loss


@dataclass
class BertConfig(PretrainedConfig):
    """Keys of a BERT ``config.json``, with Hugging Face's defaults (bert-base-uncased)."""

    model_type: ClassVar[str] = "bert"

    vocab_size: int = 30522
    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    intermediate_size: int = 3072
    hidden_act: str = "gelu"
    hidden_dropout_prob: float = 0.1
    attention_probs_dropout_prob: float = 0.1
    classifier_dropout: float | None = None
    max_position_embeddings: int = 512
    type_vocab_size: int = 2
    initializer_range: float = 0.02
    layer_norm_eps: float = 1e-12
    pad_token_id: int | None = 0
    position_embedding_type: str = "absolute"
    tie_word_embeddings: bool = True

    def __post_init__(self):
        super().__post_init__()
        heads = self.num_attention_heads
        if self.hidden_size % heads:
            raise InputError(f"hidden_size {self.hidden_size} is no multiple of num_attention_heads {heads}")
        if self.position_embedding_type != "absolute":
            raise InputError(f"position_embedding_type {self.position_embedding_type!r} is not 'absolute'")
        for key in ("is_decoder", "add_cross_attention"):
            if self.extra.get(key):
                raise InputError(f"{key} is true, but only BERT's encoder is supported")


class BertEmbeddings(nn.Cell):
    """Sum of word, position and token-type embeddings, normalised."""

    def __init__(self, config: BertConfig):
        super().__init__()
        width = config.hidden_size
        self.word_embeddings = Embedding(config.vocab_size, width, config.pad_token_id)
        self.position_embeddings = Embedding(config.max_position_embeddings, width)
        self.token_type_embeddings = Embedding(config.type_vocab_size, width)
        self.LayerNorm = LayerNorm(width, config.layer_norm_eps)
        self.dropout = dropout(config.hidden_dropout_prob)
        self.positions = Tensor(list(range(config.max_position_embeddings)), ms.int32)

    def construct(self, input_ids, token_type_ids=None, position_ids=None, inputs_embeds=None):
        words = self.word_embeddings(input_ids) if inputs_embeds is None else inputs_embeds
        if position_ids is None:
            position_ids = self.default_positions(input_ids, words)
        if token_type_ids is None:
            token_type_ids = ops.zeros(words.shape[:2], ms.int32)
        typed = words + self.token_type_embeddings(token_type_ids)
        return self.dropout(norm_of_sum(self.LayerNorm, typed, self.position_embeddings(position_ids)))

    def default_positions(self, input_ids, words):
        """Where tokens stand if a call does not say; runs inside a graph."""
        length = check_length(words.shape[1], self.positions.shape[0])
        return ops.tile(self.positions[:length].reshape((1, length)), (words.shape[0], 1))


class BertSelfAttention(nn.Cell):
    """Queries, keys and values of one layer, and the attention between them."""

    def __init__(self, config: BertConfig):
        super().__init__()
        width, heads = config.hidden_size, config.num_attention_heads
        self.query = Linear(width, width)
        self.key = Linear(width, width)
        self.value = Linear(width, width)
        self.split_heads = SplitHeads(heads)
        self.attention = Attention(heads, width // heads, config.attention_probs_dropout_prob)

    def construct(self, hidden, mask=None, queries=None):
        query = self.split_heads(self.query(hidden if queries is None else queries))
        key = self.split_heads(self.key(hidden))
        value = self.split_heads(self.value(hidden))
        return self.attention(query, key, value, mask)


class BertOutput(nn.Cell):
    """Projection, dropout, residual and norm that end both halves of a layer."""

    def __init__(self, config: BertConfig, in_features: int):
        super().__init__()
        self.dense = Linear(in_features, config.hidden_size)
        self.LayerNorm = LayerNorm(config.hidden_size, config.layer_norm_eps)
        self.dropout = dropout(config.hidden_dropout_prob)

    def construct(self, hidden, residual):
        return norm_of_sum(self.LayerNorm, self.dropout(self.dense(hidden)), residual)


class BertAttention(nn.Cell):
    """The attention half of a layer."""

    def __init__(self, config: BertConfig):
        super().__init__()
        self.self = BertSelfAttention(config)
        self.output = BertOutput(config, config.hidden_size)

    def construct(self, hidden, mask=None, queries=None):
        return self.output(self.self(hidden, mask, queries), hidden if queries is None else queries)


class BertIntermediate(nn.Cell):
    """The widening projection of the feed-forward half."""

    def __init__(self, config: BertConfig):
        super().__init__()
        self.dense = Linear(config.hidden_size, config.intermediate_size)
        self.activation = activation(config.hidden_act)

    def construct(self, hidden):
        return self.activation(self.dense(hidden))


class BertLayer(nn.Cell):
    """One encoder layer, as `EncoderStack` calls it."""

    def __init__(self, config: BertConfig):
        super().__init__()
        self.attention = BertAttention(config)
        self.intermediate = BertIntermediate(config)
        self.output = BertOutput(config, config.intermediate_size)

    def construct(self, hidden, mask=None, queries=None):
        hidden = self.attention(hidden, mask, queries)
        return self.output(self.intermediate(hidden), hidden)


class BertEncoder(EncoderStack):
    """The stack of layers."""

    def __init__(self, config: BertConfig):
        super().__init__(BertLayer(config) for _ in range(config.num_hidden_layers))


class BertPooler(nn.Cell):
    """``tanh(dense(first token))``."""

    def __init__(self, config: BertConfig):
        super().__init__()
        self.dense = Linear(config.hidden_size, config.hidden_size)
        self.tanh = tanh()

    def construct(self, hidden):
        return self.tanh(self.dense(hidden[:, 0]))


class BertPreTrainedModel(PreTrainedModel):
    """What all BERT classes share."""

    config_class = BertConfig
    base_model_prefix = "bert"
    ignored_on_load = (r"embeddings\.position_ids$",)

    def get_input_embeddings(self) -> nn.Cell:
        """Return the word embedding."""
        return getattr(self, self.base_model_prefix, self).embeddings.word_embeddings


class BertModel(BertPreTrainedModel):
    """The encoder with its pooler: features."""

    embeddings_class: ClassVar[type[BertEmbeddings]] = BertEmbeddings

    def __init__(self, config: BertConfig, add_pooling_layer: bool = True):
        super().__init__(config)
        self.embeddings = self.embeddings_class(config)
        self.encoder = BertEncoder(config)
        self.pooler = BertPooler(config) if add_pooling_layer else None
        self.additive_mask = AdditiveMask(config.num_attention_heads)

    def construct(
        self,
        input_ids,
        attention_mask=None,
        token_type_ids=None,
        position_ids=None,
        inputs_embeds=None,
        output_hidden_states=False,
        first_only=False,
    ):
        """Encode tokens.

        Args:
            input_ids: (batch, length) integers.
            attention_mask: (batch, length), (batch, length, length) or (batch, 1 or heads, 1 or length,
                length), 1 = attend; four axes of floats are added to the scores. None attends to all.
            token_type_ids: (batch, length) integers, zeros if None.
            position_ids: (batch, length) integers, 0, 1, 2, ... if None.
            inputs_embeds: (batch, length, hidden) in place of the word embeddings of input_ids.
            output_hidden_states: a constant of the graph.
            first_only: a constant of the graph: last_hidden_state may be that of the first token alone,
                (batch, 1, hidden), for which less is computed.

        Returns:
            ``(last_hidden_state, pooled)``, pooled (batch, hidden) or None without a pooler; with
            output_hidden_states a third entry, the tuple of hidden states before and after each layer.
        """
        hidden = self.embeddings(input_ids, token_type_ids, position_ids, inputs_embeds)
        length = hidden.shape[1]
        mask = None if attention_mask is None else self.additive_mask(attention_mask, length, hidden.dtype)
        states = self.encoder(hidden, mask, first_only)
        pooled = None if self.pooler is None else self.pooler(states[-1])
        if output_hidden_states:
            return states[-1], pooled, states
        return states[-1], pooled


def head_dropout(config: BertConfig) -> nn.Cell:
    """The dropout before a classifier."""
    rate = config.hidden_dropout_prob if config.classifier_dropout is None else config.classifier_dropout
    return dropout(rate)


class BertForSequenceClassification(BertPreTrainedModel):
    """Classes, several labels at once, or numbers for a whole text: ``config.problem_type`` says which."""

    def __init__(self, config: BertConfig):
        super().__init__(config)
        self.bert = BertModel(config)
        self.bert.encoder.set_last_apart()
        self.dropout = head_dropout(config)
        self.classifier = Linear(config.hidden_size, config.num_labels)

    def construct(
        self,
        input_ids,
        attention_mask=None,
        token_type_ids=None,
        position_ids=None,
        labels=None,
        example_mask=None,
        inputs_embeds=None,
    ):
        """Return logits (batch, num_labels), or ``(loss, logits)`` with labels.

        Args:
            labels: (batch,) class numbers, -100 to leave a row out; (batch, num_labels) floats for several
                labels at once; (batch,) or (batch, num_labels) floats for regression.
            example_mask: (batch,) floats, 0 leaves a row out of a loss over floats.

        The other arguments are those of :class:`BertModel`.
        """
        inputs = input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds
        pooled = self.bert(*inputs, first_only=True)[1]
        logits = self.classifier(self.dropout(pooled))
        if labels is None:
            return logits
        return classification_loss(logits, labels, self.config.problem_type, example_mask), logits


class BertTokenModel(BertPreTrainedModel):
    """What the models with an output for each token share; they define ``scores`` and ``loss``."""

    backbone: ClassVar[type[BertModel]] = BertModel

    def __init__(self, config: BertConfig):
        super().__init__(config)
        setattr(self, self.base_model_prefix, self.backbone(config, add_pooling_layer=False))

    def construct(
        self,
        input_ids,
        attention_mask=None,
        token_type_ids=None,
        position_ids=None,
        labels=None,
        inputs_embeds=None,
    ):
        """Return logits, or ``(loss, logits)`` with labels; the inputs are those of :class:`BertModel`."""
        encoder = getattr(self, self.base_model_prefix)
        hidden = encoder(input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds)[0]
        logits = self.scores(hidden)
        return logits if labels is None else (self.loss(logits, labels), logits)

    def loss(self, logits, labels):
        return cross_entropy(logits, labels)


class BertForTokenClassification(BertTokenModel):
    """A class for each token: logits (batch, length, num_labels), labels (batch, length), -100 left out."""

    def __init__(self, config: BertConfig):
        super().__init__(config)
        self.dropout = head_dropout(config)
        self.classifier = Linear(config.hidden_size, config.num_labels)

    def scores(self, hidden):
        return self.classifier(self.dropout(hidden))


class BertForQuestionAnswering(BertTokenModel):
    """First and last token of an answer: logits (batch, length, 2), labels (batch, 2), the two positions."""

    def __init__(self, config: BertConfig):
        super().__init__(config)
        self.qa_outputs = Linear(config.hidden_size, 2)

    def scores(self, hidden):
        return self.qa_outputs(hidden)

    def loss(self, logits, labels):
        return span_loss(logits, labels)


class BertPredictionHeadTransform(nn.Cell):
    """Projection, activation and norm before the vocabulary."""

    def __init__(self, config: BertConfig):
        super().__init__()
        self.dense = Linear(config.hidden_size, config.hidden_size)
        self.activation = activation(config.hidden_act)
        self.LayerNorm = LayerNorm(config.hidden_size, config.layer_norm_eps)

    def construct(self, hidden):
        return self.LayerNorm(self.activation(self.dense(hidden)))


class BertLMPredictionHead(nn.Cell):
    """Scores of the vocabulary."""

    def __init__(self, config: BertConfig):
        super().__init__()
        self.transform = BertPredictionHeadTransform(config)
        self.decoder = Linear(config.hidden_size, config.vocab_size)
        # Tied: one parameter under both names. Untied, transformers keeps a bias that it never uses.
        self.bias = self.decoder.bias if config.tie_word_embeddings else empty_parameter((config.vocab_size,))

    def construct(self, hidden):
        return self.decoder(self.transform(hidden))


class BertOnlyMLMHead(nn.Cell):
    """Holds the prediction head under the name that checkpoints give it."""

    def __init__(self, config: BertConfig):
        super().__init__()
        self.predictions = BertLMPredictionHead(config)

    def construct(self, hidden):
        return self.predictions(hidden)


class BertForMaskedLM(BertTokenModel):
    """Masked tokens: logits (batch, length, vocab_size), labels (batch, length), -100 left out."""

    def __init__(self, config: BertConfig):
        super().__init__(config)
        self.cls = BertOnlyMLMHead(config)
        if config.tie_word_embeddings:
            self.cls.predictions.decoder.weight = self.bert.embeddings.word_embeddings.weight

    def scores(self, hidden):
        return self.cls(hidden)

    def get_output_embeddings(self) -> nn.Cell:
        """Return the projection to the vocabulary, which ``target_modules="all-linear"`` leaves out."""
        return self.cls.predictions.decoder


HEADS = {
    "AutoModel": BertModel,
    "AutoModelForSequenceClassification": BertForSequenceClassification,
    "AutoModelForTokenClassification": BertForTokenClassification,
    "AutoModelForQuestionAnswering": BertForQuestionAnswering,
    "AutoModelForMaskedLM": BertForMaskedLM,
}
