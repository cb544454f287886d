"""Phi-3 (Abdin et al., 2024): one weight for queries, keys and values, one for both halves of the gate."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from mindpeft.models.decoder import (
    DecoderForCausalLM,
    DecoderForSequenceClassification,
    DecoderForTokenClassification,
    DecoderModel,
)
from mindpeft.models.decoder_config import FULL, SLIDING, DecoderConfig
from mindpeft.nn.decoder import DecoderLayer, JoinedAttention, JoinedMLP


@dataclass
class Phi3Config(DecoderConfig):
    """Keys of a Phi-3 ``config.json``, with Hugging Face's defaults."""

    model_type = "phi3"

    vocab_size: int = 32064
    hidden_size: int = 3072
    intermediate_size: int = 8192
    resid_pdrop: float = 0.0
    embd_pdrop: float = 0.0
    max_position_embeddings: int = 4096
    original_max_position_embeddings: int = 4096
    rms_norm_eps: float = 1e-5
    eos_token_id: int | list[int] | None = 32000
    pad_token_id: int | None = 32000
    sliding_window: int | None = None

    def kinds_of_layers(self) -> list[str]:
        return [FULL if self.sliding_window is None else SLIDING] * self.num_hidden_layers

    def rope_of(self, kind: str) -> dict[str, Any]:
        values = dict(super().rope_of(kind))
        if values.get("rope_type", values.get("type")) in ("su", "yarn"):  # older names of the same
            values["rope_type"] = "longrope"
        values["original_max_position_embeddings"] = self.original_max_position_embeddings
        return values


class Phi3Layer(DecoderLayer):
    """A layer with joined weights."""

    attention_class = JoinedAttention
    mlp_class = JoinedMLP


class Phi3Model(DecoderModel):
    """The stack of layers: features."""

    config_class = Phi3Config
    layer_class = Phi3Layer


class Phi3ForCausalLM(DecoderForCausalLM):
    """The next token."""

    config_class = Phi3Config
    backbone = Phi3Model


class Phi3ForSequenceClassification(DecoderForSequenceClassification):
    """Labels of a whole text."""

    config_class = Phi3Config
    backbone = Phi3Model


class Phi3ForTokenClassification(DecoderForTokenClassification):
    """A class for each token."""

    config_class = Phi3Config
    backbone = Phi3Model


HEADS = {
    "AutoModel": Phi3Model,
    "AutoModelForCausalLM": Phi3ForCausalLM,
    "AutoModelForSequenceClassification": Phi3ForSequenceClassification,
    "AutoModelForTokenClassification": Phi3ForTokenClassification,
}
