"""RoBERTa and XLM-R (Liu et al., 2019): BERT with positions that count the tokens, and its own heads."""

from __future__ import annotations

from dataclasses import dataclass

import mindspore as ms
import mindspore.nn as nn
from mindspore import ops

from mindpeft.models.bert import (
    BertConfig,
    BertEmbeddings,
    BertForQuestionAnswering,
    BertForTokenClassification,
    BertModel,
    BertPreTrainedModel,
    BertTokenModel,
    head_dropout,
)
from mindpeft.nn import LayerNorm, Linear, empty_parameter
from mindpeft.ops.activations import activation, tanh
from mindpeft.ops.checks import check_length
from mindpeft.ops.losses import classification_loss


@dataclass
class RobertaConfig(BertConfig):
    """Keys of a RoBERTa ``config.json``, with Hugging Face's defaults (roberta-base)."""

    model_type = "roberta"

    vocab_size: int = 50265
    pad_token_id: int | None = 1
    bos_token_id: int | None = 0
    eos_token_id: int | list[int] | None = 2


class RobertaEmbeddings(BertEmbeddings):
    """Positions begin behind that of padding, and padding is not counted."""

    def __init__(self, config: RobertaConfig):
        super().__init__(config)
        self.pad = config.pad_token_id
        self.position_embeddings.padding_idx = self.pad

    def default_positions(self, input_ids, words):
        length = check_length(words.shape[1], self.positions.shape[0] - self.pad - 1)
        if input_ids is None:
            places = ops.tile(self.positions[:length].reshape((1, length)), (words.shape[0], 1))
            return places + self.pad + 1
        real = (input_ids != self.pad).astype(ms.float32)
        return (ops.cumsum(real, 1) * real).astype(ms.int32) + self.pad


class RobertaModel(BertModel):
    """The encoder with its pooler: features."""

    config_class = RobertaConfig
    base_model_prefix = "roberta"
    embeddings_class = RobertaEmbeddings


class RobertaClassificationHead(nn.Cell):
    """Labels from the first token."""

    def __init__(self, config: RobertaConfig):
        super().__init__()
        self.dense = Linear(config.hidden_size, config.hidden_size)
        self.dropout = head_dropout(config)
        self.out_proj = Linear(config.hidden_size, config.num_labels)
        self.tanh = tanh()

    def construct(self, hidden):
        first = self.dropout(hidden[:, 0])
        return self.out_proj(self.dropout(self.tanh(self.dense(first))))


class RobertaForSequenceClassification(BertPreTrainedModel):
    """Classes, several labels at once, or numbers for a whole text: ``config.problem_type`` says which."""

    config_class = RobertaConfig
    base_model_prefix = "roberta"

    def __init__(self, config: RobertaConfig):
        super().__init__(config)
        self.roberta = RobertaModel(config, add_pooling_layer=False)
        self.roberta.encoder.set_last_apart()
        self.classifier = RobertaClassificationHead(config)

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
        """The arguments are those of `BertForSequenceClassification`."""
        inputs = input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds
        hidden = self.roberta(*inputs, first_only=True)[0]
        logits = self.classifier(hidden)
        if labels is None:
            return logits
        return classification_loss(logits, labels, self.config.problem_type, example_mask), logits


class RobertaForTokenClassification(BertForTokenClassification):
    """A class for each token."""

    config_class = RobertaConfig
    base_model_prefix = "roberta"
    backbone = RobertaModel


class RobertaForQuestionAnswering(BertForQuestionAnswering):
    """First and last token of an answer."""

    config_class = RobertaConfig
    base_model_prefix = "roberta"
    backbone = RobertaModel


class RobertaLMHead(nn.Cell):
    """Scores of the vocabulary."""

    def __init__(self, config: RobertaConfig):
        super().__init__()
        self.dense = Linear(config.hidden_size, config.hidden_size)
        self.layer_norm = LayerNorm(config.hidden_size, config.layer_norm_eps)
        self.decoder = Linear(config.hidden_size, config.vocab_size)
        # Tied: one parameter under both names. Untied, transformers keeps a bias that it never uses.
        self.bias = self.decoder.bias if config.tie_word_embeddings else empty_parameter((config.vocab_size,))
        self.activation = activation("gelu")

    def construct(self, hidden):
        return self.decoder(self.layer_norm(self.activation(self.dense(hidden))))


class RobertaForMaskedLM(BertTokenModel):
    """Masked tokens: logits (batch, length, vocab_size), labels (batch, length), -100 left out."""

    config_class = RobertaConfig
    base_model_prefix = "roberta"
    backbone = RobertaModel

    def __init__(self, config: RobertaConfig):
        super().__init__(config)
        self.lm_head = RobertaLMHead(config)
        if config.tie_word_embeddings:
            self.lm_head.decoder.weight = self.roberta.embeddings.word_embeddings.weight

    def scores(self, hidden):
        return self.lm_head(hidden)

    def get_output_embeddings(self) -> nn.Cell:
        """Return the projection to the vocabulary, which ``target_modules="all-linear"`` leaves out."""
        return self.lm_head.decoder


HEADS = {
    "AutoModel": RobertaModel,
    "AutoModelForSequenceClassification": RobertaForSequenceClassification,
    "AutoModelForTokenClassification": RobertaForTokenClassification,
    "AutoModelForQuestionAnswering": RobertaForQuestionAnswering,
    "AutoModelForMaskedLM": RobertaForMaskedLM,
}
