"""A network small enough to compile in a second, and the same in torch."""

from __future__ import annotations

import mindspore as ms
import numpy as np
import torch
from mindspore import Parameter, Tensor, mint, nn, ops

from mindpeft.ops.dropout import dropout as make_dropout

VOCABULARY, WIDTH, LABELS = 30, 8, 4


class SmallClassifier(nn.Cell):
    """Frozen embedding, sum over the sequence, LayerNorm, two linear layers (no tanh: off by 4e-5 on CPU)."""

    def __init__(self, dropout: float = 0.0, seed: int = 0):
        super().__init__()
        self.table = Parameter(Tensor(make_weights(seed)["table"]), requires_grad=False)
        self.norm = nn.LayerNorm((WIDTH,), epsilon=1e-5)
        self.hidden = nn.Dense(WIDTH, WIDTH)
        self.head = nn.Dense(WIDTH, LABELS)
        self.drop = make_dropout(dropout)
        weights = make_weights(seed)
        for layer in ("hidden", "head"):
            getattr(self, layer).weight.set_data(Tensor(weights[f"{layer}.weight"]))
            getattr(self, layer).bias.set_data(Tensor(weights[f"{layer}.bias"]))

    def construct(self, input_ids, attention_mask=None, token_type_ids=None, position_ids=None, labels=None):
        embedded = ops.gather(self.table, input_ids, 0)
        if attention_mask is not None:
            embedded = embedded * attention_mask.astype(ms.float32).expand_dims(-1)
        hidden = self.norm(mint.sum(embedded, 1))
        logits = self.head(self.drop(ops.sigmoid(self.hidden(hidden))))
        if labels is None:
            return logits
        return ops.cross_entropy(logits, labels), logits

    def save_pretrained(self, folder):
        from mindpeft.convert.safetensors_file import write_safetensors
        from mindpeft.convert.tensors import RawTensor

        tensors = [(path, RawTensor.from_parameter(p)) for path, p in self.parameters_and_names()]
        write_safetensors(f"{folder}/model.safetensors", tensors)


def make_weights(seed: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    shapes = {
        "table": (VOCABULARY, WIDTH),
        "hidden.weight": (WIDTH, WIDTH),
        "hidden.bias": (WIDTH,),
        "head.weight": (LABELS, WIDTH),
        "head.bias": (LABELS,),
    }
    return {name: (rng.standard_normal(shape) * 0.5).astype(np.float32) for name, shape in shapes.items()}


class TorchTwin(torch.nn.Module):
    def __init__(self, seed: int = 0):
        super().__init__()
        weights = {name: torch.tensor(value) for name, value in make_weights(seed).items()}
        self.table = weights["table"]
        self.norm = torch.nn.LayerNorm(WIDTH)
        self.hidden = torch.nn.Linear(WIDTH, WIDTH)
        self.head = torch.nn.Linear(WIDTH, LABELS)
        self.load_state_dict({n: v for n, v in weights.items() if n != "table"}, strict=False)

    def forward(self, input_ids, labels):
        hidden = self.norm(self.table[input_ids].sum(1))
        logits = self.head(torch.sigmoid(self.hidden(hidden)))
        return torch.nn.functional.cross_entropy(logits, labels)


def make_batches(count: int, batch: int = 4, length: int = 6, seed: int = 1) -> list[dict[str, np.ndarray]]:
    rng = np.random.default_rng(seed)
    return [
        {
            "input_ids": rng.integers(0, VOCABULARY, (batch, length)).astype(np.int32),
            "labels": rng.integers(0, LABELS, (batch,)).astype(np.int32),
        }
        for _ in range(count)
    ]


def make_examples(count: int, seed: int = 2) -> list[dict]:
    """Feature dicts whose label can be learned from the first token; two lengths."""
    rng = np.random.default_rng(seed)
    examples = []
    for i in range(count):
        ids = rng.integers(0, VOCABULARY, 5 if i % 2 else 9).tolist()
        examples.append({"input_ids": ids, "attention_mask": [1] * len(ids), "labels": sum(ids) % LABELS})
    return examples
