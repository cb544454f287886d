"""Diff pruning: a difference for every weight of the targeted cells, most of which training makes zero.

Guo, Rush and Kim 2021, "Parameter-Efficient Transfer Learning with Diff Pruning": W + z * w, where each gate
z is a stretched, clipped sigmoid of noise (Louizos, Welling and Kingma 2018, "Learning Sparse Neural Networks
through L0 Regularization"), and the training loss has the expected number of open gates as a term:

    z = clip(sigmoid((log(u / (1 - u)) + alpha) / temperature) * (zeta - gamma) + gamma, 0, 1)
    P(z > 0) = sigmoid(alpha - temperature * log(-gamma / zeta))

With ``structured``, a tensor's gates are multiplied by one more gate of the whole tensor. Evaluation has no
noise: u = 1/2. At the update ``prune_step`` the largest differences over all cells are kept, up to the target
fraction, and the other gates are closed for good.

Hugging Face PEFT has no such method; the folder has PEFT's shape, with sparse tensors: see
``diff_pruning_sparse``.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from typing import ClassVar

import mindspore as ms
import numpy as np
from mindspore import Tensor, nn, ops

from mindpeft.config import PeftType, register_method
from mindpeft.errors import InputError
from mindpeft.parameters import assign
from mindpeft.tuners.base import Shapes, Slot, TunerLayer, check_linear, is_embedding
from mindpeft.tuners.diff_pruning_layers import (
    OPEN,
    DiffEmbedding,
    DiffLayer,
    DiffLinear,
    DiffNorm,
    diff_tensors,
)
from mindpeft.tuners.diff_pruning_sparse import is_sparse
from mindpeft.tuners.hooks import TrainingHook
from mindpeft.tuners.targeted import TargetedConfig, check_count, check_number


@register_method
@dataclass
class DiffPruningConfig(TargetedConfig):
    """Diff pruning's configuration.

    Attributes:
        target_modules: linear, embedding and normalisation cells: names or dotted suffixes, or a regular
            expression for the full path, or "all-linear"; ``None`` takes LoRA's default for the model type.
        exclude_modules: cells never targeted, given the same way.
        modules_to_save: cells trained and saved whole (a fresh head).
        structured: a gate for each whole tensor besides.
        l0_weight: the weight of the expected number of open gates in the training loss.
        target_fraction: the share of the differences that is left after ``prune_step``.
        prune_step: the update after which the largest differences are kept and the others dropped, those
            kept being trained on; ``None`` leaves it to the gates.
        alpha_init: what the gates begin with; 5 is wide open.
        temperature, gamma, zeta: of the gates.
        kept: how many differences a file has of each tensor; written with it.

    Raises:
        InputError: a value is not allowed.
    """

    exclude_modules: set[str] | list[str] | str | None = None
    structured: bool = False
    l0_weight: float = 1.25e-7
    target_fraction: float = 0.005
    prune_step: int | None = None
    alpha_init: float = 5.0
    temperature: float = 1.0
    gamma: float = -1.5
    zeta: float = 1.5
    kept: dict[str, int] | None = None

    METHOD: ClassVar[PeftType] = PeftType.DIFF_PRUNING
    IN_PEFT: ClassVar[bool] = False
    WHOLE_NUMBERS: ClassVar[tuple[str, ...]] = (*TargetedConfig.WHOLE_NUMBERS, "indices")

    def __post_init__(self) -> None:
        super().__post_init__()
        for key in ("l0_weight", "target_fraction", "alpha_init", "temperature", "gamma", "zeta"):
            check_number(key, getattr(self, key))
        if self.l0_weight < 0:
            raise InputError(f"l0_weight must not be negative, and is {self.l0_weight}")
        if not 0 < self.target_fraction <= 1:
            raise InputError(f"target_fraction must lie in (0, 1], not {self.target_fraction}")
        if self.temperature <= 0:
            raise InputError(f"temperature must be positive, and is {self.temperature}")
        if not (self.gamma < 0 and self.zeta > 1):
            raise InputError(f"gamma must be below 0 and zeta above 1, not {self.gamma} and {self.zeta}")
        if self.prune_step is not None:
            check_count("prune_step", self.prune_step)
        for tensor, count in (self.kept or {}).items():
            check_count(f"kept[{tensor!r}]", count, least=0)

    def check_file(self) -> None:
        if self.kept is None:
            raise InputError("the key 'kept' is missing: how many differences the file has of each tensor")

    def slot_class(self, cell: nn.Cell, path: str) -> type[TunerLayer]:
        if is_embedding(cell):
            return DiffEmbedding
        if "norm" in type(cell).__name__.lower() and set(diff_tensors(cell)) <= {"weight", "bias"}:
            return DiffNorm
        check_linear(cell, path, "diff pruning")
        return DiffLinear

    def for_file(self, tensors: Mapping[str, Mapping[str, np.ndarray]]) -> DiffPruningConfig:
        kept = {
            f"{path}.{name.removesuffix('.values')}": value.size
            for path, values in tensors.items()
            for name, value in values.items()
            if name.endswith(".values")
        }
        return replace(self, kept=kept)

    def training_hook(self, slots: Mapping[str, Slot], shapes: Mapping[str, Shapes]) -> TrainingHook | None:
        fresh = [slot for path, slot in slots.items() if not is_sparse(shapes[path])]
        return DiffHook(self, fresh) if fresh else None

    @property
    def shift(self) -> float:
        """What an alpha is less by in the probability of its gate's being open."""
        return self.temperature * math.log(-self.gamma / self.zeta)

    def gates(self, alpha: np.ndarray) -> np.ndarray:
        """The gates of evaluation, on the host."""
        opened = 1 / (1 + np.exp(-alpha.astype(np.float64) / self.temperature))
        return np.clip(opened * (self.zeta - self.gamma) + self.gamma, 0, 1).astype(np.float32)


class DiffHook(TrainingHook):
    """The expected number of open gates as a term of the loss, and the pruning at ``prune_step``."""

    def __init__(self, config: DiffPruningConfig, layers: Collection[DiffLayer]) -> None:
        super().__init__(())
        self.config, self.layers = config, tuple(layers)
        places = [
            (layer, name.removesuffix("_alpha"))
            for layer in layers
            for name in layer.slot_shapes
            if name.endswith("_alpha")
        ]
        self.places = tuple(places)
        self.alphas = ms.ParameterTuple(layer.slot(f"{name}_alpha") for layer, name in places)
        self.groups = ms.ParameterTuple(layer.slot(f"{name}_group") for layer, name in places)
        self.structured, self.weight, self.shift = config.structured, config.l0_weight, config.shift

    def penalty(self) -> Tensor:
        total = Tensor(0.0, ms.float32)
        for i in range(len(self.alphas)):
            opened = ops.sum(ops.sigmoid(self.alphas[i].astype(ms.float32) - self.shift))
            if self.structured:
                group = ops.sigmoid(self.groups[i].astype(ms.float32) - self.shift)
                opened = opened * ops.reshape(group, ())
            total = total + opened
        return total * self.weight

    def after_step(self, step: int) -> None:
        if step == self.config.prune_step:
            self.prune()

    def prune(self) -> None:
        """Keep the largest differences over all cells, up to the target fraction; close the other gates."""
        values = []
        for layer, name in self.places:
            alpha, group = (layer.slot(f"{name}_{kind}").asnumpy() for kind in ("alpha", "group"))
            gates = self.config.gates(alpha) * self.config.gates(group)
            values.append(gates * layer.slot(name).asnumpy().astype(np.float32))
        sizes = np.abs(np.concatenate([value.reshape(-1) for value in values]))
        kept = max(1, round(self.config.target_fraction * sizes.size))
        threshold = np.partition(sizes, sizes.size - kept)[sizes.size - kept]
        for (layer, name), value in zip(self.places, values, strict=True):
            left = (np.abs(value) >= threshold) & (value != 0)
            assign(layer.slot(name), np.where(left, value, 0).astype(np.float32))
            assign(layer.slot(f"{name}_alpha"), np.where(left, OPEN, -OPEN).astype(np.float32))
            assign(layer.slot(f"{name}_group"), np.full(1, OPEN, np.float32))
