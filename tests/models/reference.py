"""Small random BERTs of transformers, saved to a folder that both sides open, and batches for them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import mindspore as ms
import numpy as np
import torch
import transformers
from mindspore import Tensor

from mindpeft import models

SIZES = {
    "vocab_size": 61,
    "hidden_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 56,
    "max_position_embeddings": 24,
    "type_vocab_size": 3,
    "layer_norm_eps": 1e-12,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
    "attn_implementation": "eager",  # unlike "sdpa" it says what a row without any visible token gives
}

# Our class and transformers', both by the name of their Auto class.
HEADS = {
    "features": "AutoModel",
    "sequence": "AutoModelForSequenceClassification",
    "token": "AutoModelForTokenClassification",
    "answer": "AutoModelForQuestionAnswering",
    "masked": "AutoModelForMaskedLM",
}


def make_reference(head: str, folder: Path, seed: int = 0, **config: Any) -> transformers.PreTrainedModel:
    """A random BERT of transformers, saved into ``folder``.

    Biases and norms are random too (transformers would leave them 0 and 1), and the weights large enough for
    attention to be far from uniform.
    """
    torch.manual_seed(seed)
    auto = getattr(transformers, HEADS[head])
    model = auto.from_config(transformers.BertConfig(**{**SIZES, **config}))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(1.0 if name.endswith("LayerNorm.weight") else 0.0, 0.2)
    model.save_pretrained(folder)
    return model.eval()


def open_ours(head: str, folder: Path, **options: Any) -> ms.nn.Cell:
    """The same checkpoint here."""
    return getattr(models, HEADS[head]).from_pretrained(folder, **options)


def make_batch(
    batch: int = 3,
    length: int = 11,
    seed: int = 1,
    padded: bool = True,
    types: int = SIZES["type_vocab_size"],
) -> dict[str, np.ndarray]:
    """Token ids with padding at the ends of all rows but the first, and token types."""
    rng = np.random.default_rng(seed)
    lengths = np.maximum(1, length - 3 * np.arange(batch)) if padded else np.full(batch, length)
    mask = (np.arange(length) < lengths[:, None]).astype(np.int32)
    ids = rng.integers(1, SIZES["vocab_size"], (batch, length)).astype(np.int32)
    return {
        "input_ids": ids * mask,
        "attention_mask": mask,
        "token_type_ids": rng.integers(0, types, (batch, length)).astype(np.int32),
    }


def run_ours(model: ms.nn.Cell, **arguments: Any) -> Any:
    """Call our model by keyword; arrays become tensors."""
    return model(
        **{
            name: Tensor(value) if isinstance(value, np.ndarray) else value
            for name, value in arguments.items()
        }
    )


def run_theirs(model: torch.nn.Module, **arguments: Any) -> Any:
    """Call the model of transformers by keyword; arrays become tensors (integers int64)."""
    return model(
        **{
            name: to_torch(value) if isinstance(value, np.ndarray) else value
            for name, value in arguments.items()
        }
    )


def to_torch(value: np.ndarray) -> torch.Tensor:
    """The torch tensor of an array."""
    tensor = torch.tensor(value)
    return tensor.long() if tensor.dtype == torch.int32 else tensor


def to_numpy(value: Any) -> np.ndarray:
    """A float32 array from a tensor of either side, or an array itself."""
    if isinstance(value, torch.Tensor):
        return value.detach().float().numpy()
    return value.astype(ms.float32).asnumpy() if isinstance(value, Tensor) else np.asarray(value)


def relative_error(found: Any, expected: Any) -> float:
    """``max |found - expected| / max |expected|``."""
    found, expected = to_numpy(found), to_numpy(expected)
    assert found.shape == expected.shape
    return float(np.abs(found - expected).max() / np.abs(expected).max())


def absolute_error(found: Any, expected: Any) -> float:
    """``max |found - expected|``."""
    found, expected = to_numpy(found), to_numpy(expected)
    assert found.shape == expected.shape
    return float(np.abs(found - expected).max())
