"""The same small BERT-shaped classifier twice, in torch and in MindSpore's plain cells, with equal weights.

The MindSpore one mixes `nn.Dense`, `mint.nn.Linear`, both kinds of `Embedding`, `nn.LayerNorm` and a Conv1D
with (in, out) weights on purpose. Tests get this module through the fixture `twins`.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import mindspore as ms
import numpy as np
import torch
from mindspore import mint, nn, ops
from transformers.pytorch_utils import Conv1D as TorchConv1D

from mindpeft.parameters import base_places

VOCABULARY, WIDTH, INNER, LABELS, LAYERS = 23, 16, 24, 3, 3
CONFIG = {"model_type": "bert", "hidden_size": WIDTH, "vocab_size": VOCABULARY}
IDS = np.random.default_rng(5).integers(0, VOCABULARY, (4, 7)).astype(np.int32)
IDS[0, 4:] = 0  # the padding token


class TorchSelf(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.query, self.key, self.value = (torch.nn.Linear(WIDTH, WIDTH) for _ in range(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.softmax(self.query(x) @ self.key(x).transpose(1, 2) * 0.25, -1) @ self.value(x)


class TorchOutput(torch.nn.Module):
    def __init__(self, features: int) -> None:
        super().__init__()
        self.dense, self.LayerNorm = torch.nn.Linear(features, WIDTH), torch.nn.LayerNorm(WIDTH, eps=1e-6)

    def forward(self, x: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
        return self.LayerNorm(self.dense(x) + residual)


class TorchAttention(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.add_module("self", TorchSelf())
        self.output = TorchOutput(WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.output(self.self(x), x)


class TorchLayer(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention, self.output = TorchAttention(), TorchOutput(INNER)
        self.intermediate = torch.nn.Linear(WIDTH, INNER, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.attention(x)
        return self.output(torch.tanh(self.intermediate(x)), x)


class TorchEncoder(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.ModuleList([TorchLayer() for _ in range(LAYERS)])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layer:
            x = layer(x)
        return x


class TorchModel(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.config = dict(CONFIG)
        self.words = torch.nn.Embedding(VOCABULARY, WIDTH, padding_idx=0)
        self.kinds = torch.nn.Embedding(VOCABULARY, WIDTH)
        self.LayerNorm = torch.nn.LayerNorm(WIDTH, eps=1e-6)
        self.encoder = TorchEncoder()
        self.c_attn = TorchConv1D(WIDTH, WIDTH)
        self.classifier = torch.nn.Linear(WIDTH, LABELS)

    def forward(self, input_ids: torch.Tensor, **_: Any) -> torch.Tensor:
        x = self.encoder(self.LayerNorm(self.words(input_ids) + self.kinds(input_ids)))
        return self.classifier(torch.tanh(self.c_attn(x)).mean(1))


def tanh(x: ms.Tensor) -> ms.Tensor:
    """tanh by another operator: MindSpore's own is wrong by 1e-4 at |x| = 5 on the CPU."""
    return ops.sigmoid(x * 2.0) * 2.0 - 1.0


class Conv1D(nn.Cell):
    """GPT-2's linear: weight (in, out)."""

    def __init__(self, n_out: int, n_in: int) -> None:
        super().__init__()
        self.weight = ms.Parameter(ms.Tensor(np.zeros((n_in, n_out), np.float32)), name="weight")
        self.bias = ms.Parameter(ms.Tensor(np.zeros(n_out, np.float32)), name="bias")

    def construct(self, x: ms.Tensor) -> ms.Tensor:
        return ops.matmul(x, self.weight) + self.bias


class SelfAttention(nn.Cell):
    def __init__(self) -> None:
        super().__init__()
        self.query, self.key = nn.Dense(WIDTH, WIDTH), nn.Dense(WIDTH, WIDTH)
        self.value = mint.nn.Linear(WIDTH, WIDTH)

    def construct(self, x: ms.Tensor) -> ms.Tensor:
        scores = ops.matmul(self.query(x), ops.transpose(self.key(x), (0, 2, 1))) * 0.25
        return ops.matmul(ops.softmax(scores, -1), self.value(x))


class Output(nn.Cell):
    def __init__(self, features: int) -> None:
        super().__init__()
        self.dense, self.LayerNorm = mint.nn.Linear(features, WIDTH), nn.LayerNorm((WIDTH,), epsilon=1e-6)

    def construct(self, x: ms.Tensor, residual: ms.Tensor) -> ms.Tensor:
        return self.LayerNorm(self.dense(x) + residual)


class Attention(nn.Cell):
    def __init__(self) -> None:
        super().__init__()
        self.self = SelfAttention()
        self.output = Output(WIDTH)

    def construct(self, x: ms.Tensor) -> ms.Tensor:
        return self.output(self.self(x), x)


class Layer(nn.Cell):
    def __init__(self) -> None:
        super().__init__()
        self.attention, self.output = Attention(), Output(INNER)
        self.intermediate = nn.Dense(WIDTH, INNER, has_bias=False)

    def construct(self, x: ms.Tensor) -> ms.Tensor:
        x = self.attention(x)
        return self.output(tanh(self.intermediate(x)), x)


class Encoder(nn.Cell):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.CellList([Layer() for _ in range(LAYERS)])

    def construct(self, x: ms.Tensor) -> ms.Tensor:
        for layer in self.layer:
            x = layer(x)
        return x


class Embedding(mint.nn.Embedding):
    """`mint.nn.Embedding` has no CPU kernel in PyNative mode."""

    def construct(self, input: ms.Tensor) -> ms.Tensor:
        return ops.gather(self.weight, input, 0)


class Model(nn.Cell):
    """Called as ``model(input_ids, labels=None)``: logits, or (loss, logits) with labels."""

    def __init__(self) -> None:
        super().__init__()
        self.config = SimpleNamespace(**CONFIG, name_or_path="twins/tiny")
        self.words = nn.Embedding(VOCABULARY, WIDTH, padding_idx=0)
        self.kinds = Embedding(VOCABULARY, WIDTH)
        self.LayerNorm = nn.LayerNorm((WIDTH,), epsilon=1e-6)
        self.encoder = Encoder()
        self.c_attn = Conv1D(WIDTH, WIDTH)
        self.classifier = nn.Dense(WIDTH, LABELS)

    def construct(self, input_ids: ms.Tensor, labels: ms.Tensor | None = None) -> Any:
        x = self.encoder(self.LayerNorm(self.words(input_ids) + self.kinds(input_ids)))
        logits = self.classifier(tanh(self.c_attn(x)).mean(1))
        if labels is None:
            return logits
        return ops.cross_entropy(logits, labels), logits


def make_model(seed: int = 0) -> Model:
    """A MindSpore model with weights that depend on the seed alone."""
    model, random = Model(), np.random.default_rng(seed)
    for name, place in base_places(model).items():
        value = random.normal(1.0 if name.endswith("LayerNorm.weight") else 0.0, 0.3, place.parameter.shape)
        place.write(value.astype(np.float32))
    return model


def make_torch(seed: int = 0) -> TorchModel:
    """Its torch twin."""
    model = TorchModel()
    state = {name: torch.tensor(place.read()) for name, place in base_places(make_model(seed)).items()}
    model.load_state_dict(state, strict=True)
    return model.eval()


def logits(model: nn.Cell) -> np.ndarray:
    """What a MindSpore model answers to `IDS`."""
    return model(ms.Tensor(IDS)).asnumpy()


def torch_logits(model: torch.nn.Module) -> np.ndarray:
    """What a torch model, bare or wrapped by PEFT, answers to `IDS`."""
    bare = model.get_base_model() if hasattr(model, "get_base_model") else model
    return bare(torch.tensor(IDS)).detach().numpy()
