"""XLM-R (Conneau et al., 2020): RoBERTa under another name."""

from __future__ import annotations

from dataclasses import dataclass

from mindpeft.models.roberta import (
    RobertaConfig,
    RobertaForMaskedLM,
    RobertaForQuestionAnswering,
    RobertaForSequenceClassification,
    RobertaForTokenClassification,
    RobertaModel,
)


@dataclass
class XLMRobertaConfig(RobertaConfig):
    """Keys of an XLM-R ``config.json``, with Hugging Face's defaults."""

    model_type = "xlm-roberta"

    vocab_size: int = 30522


class XLMRobertaModel(RobertaModel):
    """The encoder with its pooler: features."""

    config_class = XLMRobertaConfig


class XLMRobertaForSequenceClassification(RobertaForSequenceClassification):
    """Classes, several labels at once, or numbers for a whole text."""

    config_class = XLMRobertaConfig


class XLMRobertaForTokenClassification(RobertaForTokenClassification):
    """A class for each token."""

    config_class = XLMRobertaConfig


class XLMRobertaForQuestionAnswering(RobertaForQuestionAnswering):
    """First and last token of an answer."""

    config_class = XLMRobertaConfig


class XLMRobertaForMaskedLM(RobertaForMaskedLM):
    """Masked tokens."""

    config_class = XLMRobertaConfig


HEADS = {
    "AutoModel": XLMRobertaModel,
    "AutoModelForSequenceClassification": XLMRobertaForSequenceClassification,
    "AutoModelForTokenClassification": XLMRobertaForTokenClassification,
    "AutoModelForQuestionAnswering": XLMRobertaForQuestionAnswering,
    "AutoModelForMaskedLM": XLMRobertaForMaskedLM,
}
