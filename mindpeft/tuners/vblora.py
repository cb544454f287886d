"""VB-LoRA: LoRA whose matrices are mixed from one bank of vectors, which all layers share.

Li et al. 2024, "VB-LoRA: Extreme Parameter Efficient Fine-Tuning with Vector Banks": A and B are cut into
vectors of one length; each is the mean of the k bank vectors with the largest of its trained logits, weighted
by the softmax of those k. y = W x + B A x.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import mindspore as ms
import numpy as np
from mindspore import nn, ops

from mindpeft.config import PeftType, register_method
from mindpeft.errors import InputError
from mindpeft.ops.dropout import dropout
from mindpeft.targets import LORA_TARGETS
from mindpeft.tuners.base import (
    Shapes,
    SharedSlot,
    Site,
    Slot,
    Tensors,
    TunerLayer,
    check_linear,
    is_transposed,
    linear_features,
)
from mindpeft.tuners.plan import BaseModel
from mindpeft.tuners.targeted import TargetedConfig, check_count, check_number, check_rate

BANK, LOGITS = "vblora_vector_bank", ("vblora_logits_A", "vblora_logits_B")
INDICES, WEIGHTS = "_topk_indices", "_topk_weights"  # what follows a name where the k largest alone are saved
_TARGETS = {
    "t5": "q k v o wi wo",
    "mt5": "q k v o wi_0 wi_1 wo",
    "bart opt": "q_proj k_proj v_proj out_proj fc1 fc2",
    "gpt2 gpt_bigcode": "c_attn",
    "bloom gpt_neox": "query_key_value",
    "gptj gpt_neo llama llama4 gemma gemma2 gemma3_text qwen2 qwen3": "q_proj v_proj",
    "bert roberta": "query value",
    "deberta": "in_proj",
    "nemotron_h": "q_proj k_proj v_proj o_proj",
    "deberta-v2": "query_proj key_proj value_proj dense",
}


@register_method
@dataclass
class VBLoRAConfig(TargetedConfig):
    """Hugging Face PEFT's configuration of VB-LoRA, key by key.

    Attributes:
        r: the rank.
        num_vectors: of the bank.
        vector_length: of its vectors; it must divide the input's and the output's width of each cell.
        topk: how many vectors are mixed.
        target_modules: names or dotted suffixes of linear cells, or a regular expression for the full path,
            or "all-linear"; ``None`` takes the model type's default.
        exclude_modules: cells never targeted, given the same way.
        save_only_topk_weights: save the indices and weights of the k largest logits alone. Such a file can't
            be trained further.
        vblora_dropout: dropout on the input while training.
        fan_in_fan_out: the weights are (in, out); set from the cells themselves.
        bias: which of the base model's biases are trained: "none", "all", "vblora_only".
        modules_to_save: cells trained and saved whole (a fresh head).
        init_vector_bank_bound: the bank starts with uniform numbers up to that.
        init_logits_std: the logits start with normal numbers of that spread.
        layers_to_transform: only these layer indices; needs a list of targets.
        layers_pattern: the name before the layer index.

    Raises:
        InputError: a value is not allowed, or keys contradict each other.
    """

    r: int = 4
    num_vectors: int = 256
    vector_length: int = 256
    topk: int = 2
    exclude_modules: set[str] | list[str] | str | None = None
    save_only_topk_weights: bool = False
    vblora_dropout: float = 0.0
    fan_in_fan_out: bool = False
    bias: str = "none"
    init_vector_bank_bound: float = 0.02
    init_logits_std: float = 0.1
    layers_to_transform: list[int] | int | None = None
    layers_pattern: list[str] | str | None = None

    METHOD: ClassVar[PeftType] = PeftType.VBLORA
    EXAMPLE: ClassVar = {"vector_length": 64}
    SHARED_PREFIX: ClassVar[str] = "base_model."
    WHOLE_NUMBERS: ClassVar = (*TargetedConfig.WHOLE_NUMBERS, *(name + INDICES for name in LOGITS))
    DEFAULT_TARGETS: ClassVar = {
        **{model: names.split() for models, names in _TARGETS.items() for model in models.split()},
        "gemma4": LORA_TARGETS["gemma4"],
    }
    BIAS_ONLY = "vblora_only"

    def __post_init__(self) -> None:
        super().__post_init__()
        for key in ("r", "num_vectors", "vector_length", "topk"):
            check_count(key, getattr(self, key))
        if self.topk > self.num_vectors:
            raise InputError(f"topk={self.topk} is more than the bank has vectors, {self.num_vectors}")
        for key in ("init_vector_bank_bound", "init_logits_std"):
            check_number(key, getattr(self, key))
            if getattr(self, key) < 0:
                raise InputError(f"{key} must be 0 or more, not {getattr(self, key)!r}")
        check_rate("vblora_dropout", self.vblora_dropout)

    def slot_class(self, cell: nn.Cell, path: str) -> type[TunerLayer]:
        check_linear(cell, path, "VB-LoRA")
        n_in, n_out = linear_features(cell)
        if n_in % self.vector_length or n_out % self.vector_length:
            raise InputError(
                f"vector_length={self.vector_length} does not divide both widths of {path!r}, {n_in} and "
                f"{n_out}; the largest that does is {np.gcd(n_in, n_out)}"
            )
        return VBLoRALinear

    def slot_classes(self, base: BaseModel) -> dict[str, type[Slot]]:
        return {"": VectorBank, **super().slot_classes(base)}

    # Files with the k largest logits alone ------------------------------------------------------------------

    def from_file(self, tensors: Tensors) -> Tensors:
        if not self.save_only_topk_weights:
            return tensors
        found = {}
        for name, value in tensors.items():
            if name.endswith(INDICES):
                plain = name.removesuffix(INDICES)
                found[plain] = self._logits(plain, value, tensors.get(plain + WEIGHTS))
            elif not name.endswith(WEIGHTS):
                found[name] = value
        return found

    def _logits(self, name: str, indices: np.ndarray, weights: np.ndarray | None) -> np.ndarray:
        """Logits with that softmax of the k largest; the others are minus infinity."""
        first = (*indices.shape[:-1], self.topk - 1)
        if weights is None or weights.shape != first or indices.shape[-1:] != (self.topk,):
            raise InputError(f"{name + INDICES!r} must have {self.topk} numbers each, {WEIGHTS} one less")
        if indices.min() < 0 or indices.max() >= self.num_vectors:
            raise InputError(f"{name + INDICES!r} must be indices of the bank's {self.num_vectors} vectors")
        last = np.maximum(1 - weights.sum(-1, keepdims=True), 0)
        logits = np.full((*indices.shape[:-1], self.num_vectors), -np.inf, np.float32)
        with np.errstate(divide="ignore"):
            values = np.log(np.concatenate((weights, last), -1))
        np.put_along_axis(logits, indices.astype(np.int64), values, -1)
        return logits

    def in_file(self, tensors: Tensors) -> Tensors:
        if not self.save_only_topk_weights:
            return tensors
        sizes = {np.uint8: 2**8, np.int16: 2**15, np.int32: 2**31}
        dtype = next((dtype for dtype, size in sizes.items() if self.num_vectors < size), np.int64)
        written = {}
        for name, value in tensors.items():
            if name.endswith(LOGITS):
                indices, weights = largest(value, self.topk)
                written[name + INDICES] = indices.astype(dtype)
                written[name + WEIGHTS] = np.ascontiguousarray(weights[..., :-1])
            else:
                written[name] = value
        return written


def largest(logits: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
    """The indices of the largest logits along the last axis, the first one largest, and their softmax."""
    indices = np.argsort(-logits, axis=-1, kind="stable")[..., :count]
    values = np.take_along_axis(logits, indices, -1)
    powers = np.exp(values - values[..., :1])
    return indices, powers / powers.sum(-1, keepdims=True)


class VectorBank(SharedSlot):
    """The vectors (number, length)."""

    @classmethod
    def tensor_shapes(cls, site: Site) -> Shapes:
        return {BANK: (site.config.num_vectors, site.config.vector_length)}

    @classmethod
    def initial_tensors(cls, site: Site) -> Tensors:
        bound, (shape,) = site.config.init_vector_bank_bound, cls.tensor_shapes(site).values()
        return {BANK: np.random.uniform(-bound, bound, shape).astype(np.float32)}

    @classmethod
    def holds(cls, room: Shapes, shapes: Shapes) -> bool:
        return room == shapes


class VBLoRALinear(TunerLayer):
    """Logits of A (r, in / length, number) and of B (out / length, r, number)."""

    def __init__(self, base_layer: nn.Cell, *slot: Any) -> None:
        super().__init__(base_layer, *slot)
        self.dropout = dropout(0.0)
        self.topk = 2

    @classmethod
    def tensor_shapes(cls, site: Site) -> Shapes:
        config = site.config
        n_in, n_out = (width // config.vector_length for width in linear_features(site.cell))
        shapes = (config.r, n_in, config.num_vectors), (n_out, config.r, config.num_vectors)
        return dict(zip(LOGITS, shapes, strict=True))

    @classmethod
    def initial_tensors(cls, site: Site) -> Tensors:
        spread = site.config.init_logits_std
        shapes = cls.tensor_shapes(site)
        return {name: np.random.normal(0, spread, shape).astype(np.float32) for name, shape in shapes.items()}

    @classmethod
    def check_values(cls, site: Site, tensors: Tensors) -> None:
        if not site.config.inference_mode and any(np.isinf(value).any() for value in tensors.values()):
            raise InputError(
                "an adapter saved with save_only_topk_weights can't be trained further: the other logits are "
                "lost"
            )

    @classmethod
    def holds(cls, room: Shapes, shapes: Shapes) -> bool:
        return room == shapes  # logits of zero mean vectors, too

    @classmethod
    def merged(cls, site: Site, weights: Tensors, tensors: Tensors, shared: Tensors | None = None) -> Tensors:
        mixed = []
        for name in LOGITS:
            indices, shares = largest(tensors[name], site.config.topk)
            mixed.append((shares[..., None] * shared[BANK][indices]).sum(-2))
        first = mixed[0].reshape(len(mixed[0]), -1)
        second = mixed[1].transpose(0, 2, 1).reshape(-1, mixed[1].shape[1])
        delta = second @ first
        return {"weight": weights["weight"] + (delta.T if is_transposed(site.cell) else delta)}

    def configure(self, config: VBLoRAConfig, trainable: bool) -> bool:
        changed = self.topk != config.topk
        self.topk = config.topk
        if trainable and self.dropout.p != config.vblora_dropout:
            self.dropout = dropout(config.vblora_dropout).set_train(self.training)
            changed = True
        return changed

    def mixed(self, logits: ms.Tensor) -> ms.Tensor:
        """The vectors that logits (a, b, number) stand for, (a, b, length); runs inside a graph."""
        rows = logits.shape[0] * logits.shape[1]
        bank = self.shared.vblora_vector_bank
        length = bank.shape[1]
        values, indices = ops.topk(logits.reshape((rows, -1)), self.topk)
        shares = ops.softmax(values, -1).reshape((-1, 1))
        vectors = ops.gather(bank, indices.reshape((-1,)), 0) * ops.tile(shares, (1, length))
        total = vectors.reshape((rows, self.topk, length)).sum(1)
        return total.reshape((logits.shape[0], logits.shape[1], length))

    def construct(self, x: ms.Tensor) -> ms.Tensor:
        result = self.base_layer(x)
        rank = self.vblora_logits_A.shape[0]
        first = self.mixed(self.vblora_logits_A).reshape((rank, -1))
        second = ops.transpose(self.mixed(self.vblora_logits_B), (0, 2, 1)).reshape((-1, rank))
        hidden = self.linear(self.dropout(ops.cast(x, self.slot_dtype)), first) * self.scaling
        update = self.linear(hidden, second)
        return ops.cast(ops.cast(result, self.slot_dtype) + update, result.dtype)
