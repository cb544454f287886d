"""What Llama-shaped models share: the stack of layers, and the heads on it."""

from __future__ import annotations

from typing import Any, ClassVar

import mindspore as ms
import mindspore.nn as nn
import numpy as np
from mindspore import Tensor, ops

from mindpeft.errors import InputError
from mindpeft.models.decoder_config import AnyDecoderConfig
from mindpeft.models.pretrained import PreTrainedModel
from mindpeft.nn import Embedding, Linear
from mindpeft.nn.decoder import DecoderLayer, LayerStack
from mindpeft.ops.attention import SoftCap
from mindpeft.ops.dropout import dropout
from mindpeft.ops.losses import (
    ProjectedCrossEntropy,
    causal_loss,
    classification_loss,
    cross_entropy,
    next_labels,
)


class DecoderPreTrainedModel(PreTrainedModel):
    """What all Llama-shaped classes share."""

    base_model_prefix = "model"
    ignored_on_load = (r"rotary_emb\.inv_freq$", r"attention\.masked_bias$")

    def get_input_embeddings(self) -> nn.Cell:
        """Return the word embedding."""
        return getattr(self, self.base_model_prefix).get_input_embeddings()


class DecoderModel(DecoderPreTrainedModel, LayerStack):
    """The stack of layers: features."""

    layer_class: ClassVar[type[nn.Cell]] = DecoderLayer
    embedding_name: ClassVar[str] = "embed_tokens"

    def __init__(self, config: AnyDecoderConfig):
        super().__init__(config)
        words = Embedding(config.vocab_size, config.word_size, config.pad_token_id)
        setattr(self, self.embedding_name, words)
        self.add_layers(config.spec(), self.layer_class)

    def construct(
        self,
        input_ids,
        attention_mask=None,
        position_ids=None,
        inputs_embeds=None,
        place=None,
        output_hidden_states=False,
    ):
        """Encode tokens.

        Args:
            input_ids: (batch, length) integers.
            attention_mask: see `mindpeft.ops.causal_mask.CausalMask`.
            position_ids: (batch, length) integers, 0, 1, 2, ... if None.
            inputs_embeds: (batch, length, hidden) in place of the word embeddings of input_ids.
            place: (1,), with a cache: how many tokens stand in it.
            output_hidden_states: a constant of the graph.

        Returns:
            The hidden states, (batch, length, hidden); with output_hidden_states a pair of them and of the
            tuple of hidden states before each layer and of the result.
        """
        words = inputs_embeds
        if inputs_embeds is None:
            words = getattr(self, self.embedding_name)(input_ids)
        if position_ids is None:
            position_ids = self.positions(attention_mask, words.shape[0], words.shape[1])
        embedded = self.embedded(words, position_ids)
        hidden, states = self.through(embedded, attention_mask, position_ids, place)
        return (hidden, states) if output_hidden_states else hidden

    def get_input_embeddings(self) -> nn.Cell:
        return getattr(self, self.embedding_name)

    def positions(self, attention_mask: Tensor | None, batch: int, length: int) -> Tensor:
        """Where tokens stand if a call does not say; runs inside a graph."""
        return ops.tile(ops.arange(length).astype(ms.int32).reshape((1, length)), (batch, 1))

    def embedded(self, words: Tensor, position_ids: Tensor) -> Tensor:
        """What the first layer gets; runs inside a graph."""
        scale = self.config.embedding_scale
        return words if scale == 1.0 else words * scale


class DecoderWithHead(DecoderPreTrainedModel):
    """A decoder and what is put on its hidden states."""

    backbone: ClassVar[type[PreTrainedModel]]
    head_name: ClassVar[str]  # of the projection that ends it

    def __init__(self, config: AnyDecoderConfig):
        super().__init__(config)
        setattr(self, self.base_model_prefix, self.backbone(config))

    def features(self, *arguments):
        """The backbone's hidden states; runs inside a graph."""
        return getattr(self, self.base_model_prefix)(*arguments)

    def head(self, hidden):
        """What the projection at the end gives; runs inside a graph."""
        return getattr(self, self.head_name)(hidden)


class DecoderForCausalLM(DecoderWithHead):
    """The next token: logits (batch, length, vocab_size), labels (batch, length), -100 left out.

    Labels are the tokens themselves: that of a place is compared with the logits of the place before it.
    """

    head_name = "lm_head"

    def __init__(self, config: AnyDecoderConfig):
        super().__init__(config)
        head = Linear(config.feature_size, config.vocab_size, bias=False)
        if config.tie_word_embeddings:
            head.weight = self.get_input_embeddings().weight
        self.add_head(head)
        self.softcap = None if config.logit_softcap is None else SoftCap(config.logit_softcap)
        self.projected_loss = ProjectedCrossEntropy()

    def add_head(self, head: Linear) -> None:
        """Keep the projection to the vocabulary where checkpoints have it."""
        setattr(self, self.head_name, head)

    def construct(
        self,
        input_ids,
        attention_mask=None,
        position_ids=None,
        labels=None,
        inputs_embeds=None,
        place=None,
        logits_to_keep=0,
    ):
        """Return logits, or ``(loss, logits)`` with labels.

        Args:
            logits_to_keep: a constant of the graph: of how many tokens at the end; 0 for all.

        The other arguments are the backbone's.
        """
        hidden = self.features(input_ids, attention_mask, position_ids, inputs_embeds, place)
        if logits_to_keep:
            hidden = hidden[:, -logits_to_keep:]
        logits = self.head(hidden)
        if self.softcap is not None:
            logits = self.softcap(logits)
        return logits if labels is None else (self.loss(hidden, logits, labels), logits)

    def loss(self, hidden, logits, labels):
        """Of the next tokens; where the head is nothing but a product, a graph need not hold its logits."""
        projection = self.projection()
        if self.softcap is None and projection.is_product:
            return self.projected_loss(hidden, projection.weight, next_labels(labels))
        return causal_loss(logits, labels)

    def projection(self):
        """The projection to the vocabulary; runs inside a graph."""
        return getattr(self, self.head_name)

    def generate(self, input_ids: Any, attention_mask: Any = None, **arguments: Any) -> Tensor:
        """Write on behind prompts; see `mindpeft.generate.generate`."""
        from mindpeft.generate import generate

        return generate(self, input_ids, attention_mask, **arguments)

    def get_output_embeddings(self) -> nn.Cell:
        """Return the projection to the vocabulary, which ``target_modules="all-linear"`` leaves out."""
        return self.projection()


class DecoderForSequenceClassification(DecoderWithHead):
    """Classes, several labels at once, or numbers for a whole text, read off its last token."""

    head_name = "score"
    head_bias: ClassVar[bool] = False

    def __init__(self, config: AnyDecoderConfig):
        super().__init__(config)
        head = Linear(config.feature_size, config.num_labels, bias=self.head_bias)
        setattr(self, self.head_name, head)

    def construct(
        self,
        input_ids,
        attention_mask=None,
        position_ids=None,
        labels=None,
        example_mask=None,
        inputs_embeds=None,
    ):
        """Return logits (batch, num_labels), or ``(loss, logits)`` with labels.

        The last token is the last that is not the config's ``pad_token_id``, as in Hugging Face; with
        inputs_embeds the last of the attention mask.

        Args:
            labels: (batch,) class numbers, -100 to leave a row out; (batch, num_labels) floats for several
                labels at once; (batch,) or (batch, num_labels) floats for regression.
            example_mask: (batch,) floats, 0 leaves a row out of a loss over floats.

        The other arguments are the backbone's.
        """
        hidden = self.features(input_ids, attention_mask, position_ids, inputs_embeds)
        logits = self.head(last_tokens(hidden, input_ids, attention_mask, self.config.pad_token_id))
        if labels is None:
            return logits
        return classification_loss(logits, labels, self.config.problem_type, example_mask), logits


class DecoderForTokenClassification(DecoderWithHead):
    """A class for each token: logits (batch, length, num_labels), labels (batch, length), -100 left out."""

    head_name = "score"

    def __init__(self, config: AnyDecoderConfig):
        super().__init__(config)
        self.dropout = dropout(config.head_dropout)
        setattr(self, self.head_name, Linear(config.feature_size, config.num_labels))

    def construct(self, input_ids, attention_mask=None, position_ids=None, labels=None, inputs_embeds=None):
        """Return logits, or ``(loss, logits)`` with labels; the other arguments are the backbone's."""
        hidden = self.features(input_ids, attention_mask, position_ids, inputs_embeds)
        logits = self.head(self.dropout(hidden))
        return logits if labels is None else (cross_entropy(logits, labels), logits)


def last_tokens(
    hidden: Tensor, input_ids: Tensor | None, attention_mask: Tensor | None, pad_token_id: int | None
) -> Tensor:
    """The hidden state of each row's last token, (batch, width); runs inside a graph."""
    batch, length, width = hidden.shape
    if input_ids is not None:
        check_padding(pad_token_id, batch)
        real = ops.ones_like(input_ids) if pad_token_id is None else (input_ids != pad_token_id)
    elif attention_mask is not None and attention_mask.ndim == 2:
        real = attention_mask != 0
    else:
        real = ops.ones((batch, length), ms.int32)
    steps = ops.tile(ops.arange(length).astype(ms.float32).reshape((1, length)), (batch, 1))
    last = ops.ReduceMax()(steps * real.astype(ms.float32), 1).astype(ms.int32) + first_places(batch, length)
    return ops.gather(hidden.reshape((-1, width)), last, 0)


@ops.constexpr
def first_places(rows: int, length: int) -> Tensor:
    """Where each row begins if all stand one behind the other."""
    return Tensor(np.arange(rows) * length, ms.int32)


@ops.constexpr
def check_padding(pad_token_id: int | None, batch: int) -> None:
    """Raise ``InputError`` if there is no telling which tokens are padding."""
    if pad_token_id is None and batch > 1:
        raise InputError(
            "the last token of several texts can't be told without a pad_token_id in config.json "
            "(set it: model.config.pad_token_id = tokenizer.pad_token_id)"
        )
