"""Diff pruning: a difference for every weight of the targeted cells, most of which training makes zero.

Guo, Rush and Kim 2021, "Parameter-Efficient Transfer Learning with Diff Pruning": W + z * w, where each gate
z is a stretched, clipped sigmoid of noise (Louizos, Welling and Kingma 2018, "Learning Sparse Neural Networks
through L0 Regularization"), and the training loss has the expected number of open gates as a term:

    z = clip(sigmoid((log(u / (1 - u)) + alpha) / temperature) * (zeta - gamma) + gamma, 0, 1)
    P(z > 0) = sigmoid(alpha - temperature * log(-gamma / zeta))

With ``structured``, a tensor's gates are multiplied by one more gate of the whole tensor. Evaluation has no
noise: u = 1/2. At the update ``prune_step`` the largest differences over all cells are kept, up to the target
fraction, and the other gates are closed for good.

Hugging Face PEFT has no such method; the folder has PEFT's shape. The differences are written sparsely, where
<tensor> is the cell's "weight" or "bias":

base_model.model.<path>.diff_<tensor>.indices   (axes, kept) int32, one row for each axis of the tensor
base_model.model.<path>.diff_<tensor>.values    (kept,) float32

and ``kept`` in the config says how many there are of each.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import mindspore as ms
import numpy as np
from mindspore import Tensor, nn, ops

from mindpeft.config import PeftType, register_method
from mindpeft.errors import InputError
from mindpeft.ops.columns import every_row, scale_columns
from mindpeft.ops.linear import linear
from mindpeft.parameters import CLASSIC_NAMES, assign
from mindpeft.tuners.base import (
    Shapes,
    Site,
    Slot,
    Tensors,
    TunerLayer,
    check_linear,
    is_embedding,
    is_transposed,
    original,
)
from mindpeft.tuners.hooks import TrainingHook
from mindpeft.tuners.targeted import TargetedConfig, check_count, check_number

OPEN = 100.0  # an alpha that opens a gate for good; its negative closes it


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


def diff_tensors(cell: nn.Cell) -> dict[str, str]:
    """A cell's own parameters: torch's leaf -> the attribute."""
    names = [name.rpartition(".")[2] for name, _ in cell.parameters_and_names(expand=False)]
    return {CLASSIC_NAMES.get(name, name): name for name in names}


def dense_shapes(cell: nn.Cell) -> Shapes:
    """The tensors of training for a cell."""
    shapes: Shapes = {}
    for leaf, attribute in diff_tensors(cell).items():
        shape = tuple(getattr(cell, attribute).shape)
        shapes |= {f"diff_{leaf}": shape, f"diff_{leaf}_alpha": shape, f"diff_{leaf}_group": (1,)}
    return shapes


def is_sparse(names: Collection[str]) -> bool:
    """Whether tensors are those of a file rather than those of training."""
    return any(name.endswith(".values") for name in names)


def check_indices(name: str, indices: np.ndarray, shape: tuple[int, ...]) -> None:
    """Raise ``InputError`` unless ``indices`` (axes, kept) are different places in a tensor of ``shape``."""
    if indices.dtype.kind not in "iu":
        raise InputError(f"{name!r} must hold whole numbers, not {indices.dtype}")
    for axis, (row, length) in enumerate(zip(indices, shape, strict=True)):
        outside = row[(row < 0) | (row >= length)]
        if outside.size:
            raise InputError(
                f"{name!r} has the index {outside[0]} for axis {axis}, which must lie in [0, {length})"
            )
    flat = np.ravel_multi_index(tuple(indices.astype(np.int64)), shape)
    places, counts = np.unique(flat, return_counts=True)
    if (counts > 1).any():
        twice = tuple(map(int, np.unravel_index(places[counts.argmax()], shape)))
        raise InputError(f"{name!r} names the place {twice} twice; each difference must have its own")


def differences(site: Site, tensors: Tensors) -> Tensors:
    """z * w of evaluation by the cell's leaves, from an adapter's tensors of either kind."""
    found = {}
    for leaf, attribute in diff_tensors(site.cell).items():
        name = f"diff_{leaf}"
        if is_sparse(tensors):
            value = np.zeros(getattr(site.cell, attribute).shape, np.float32)
            value[tuple(tensors[f"{name}.indices"])] = tensors[f"{name}.values"]
        else:
            gates = site.config.gates(tensors[f"{name}_alpha"]) * site.config.gates(tensors[f"{name}_group"])
            value = gates * tensors[name].astype(np.float32)
        found[leaf] = value
    return found


class LogisticNoise(nn.Cell):
    """log(u / (1 - u)) for uniform u, by an operator that a seed repeats on the CPU."""

    def __init__(self) -> None:
        super().__init__(auto_prefix=False)
        self.normal = ops.StandardNormal()

    def construct(self, shape: tuple[int, ...]) -> Tensor:
        chance = (ops.erf(self.normal(shape) * math.sqrt(0.5)) + 1.0) * 0.5
        chance = ops.clamp(chance, 1e-6, 1.0 - 1e-6)
        return ops.log(chance) - ops.log(1.0 - chance)


class DiffLayer(TunerLayer):
    """Differences w, their gates' alphas of the same shape, and the alpha of the whole tensor's gate (1)."""

    BUFFERS = frozenset(f"diff_{leaf}.indices" for leaf in ("weight", "bias"))

    def __init__(self, base_layer: nn.Cell, path: str, shapes: Shapes, *slot: Any) -> None:
        super().__init__(base_layer, path, dense_shapes(original(base_layer)), *slot)
        self.noise = LogisticNoise()
        self.temperature, self.gamma, self.zeta = 1.0, -1.5, 1.5
        self.biased = "diff_bias" in self.slot_shapes

    @classmethod
    def tensor_shapes(cls, site: Site) -> Shapes:
        return dense_shapes(site.cell)

    @classmethod
    def file_shapes(cls, site: Site) -> Shapes:
        shapes: Shapes = {}
        for leaf, attribute in diff_tensors(site.cell).items():
            kept = (site.config.kept or {}).get(f"{site.path}.diff_{leaf}", 0)
            axes = getattr(site.cell, attribute).ndim
            shapes |= {f"diff_{leaf}.indices": (axes, kept), f"diff_{leaf}.values": (kept,)}
        return shapes

    @classmethod
    def check_values(cls, site: Site, tensors: Tensors) -> None:
        for leaf, attribute in diff_tensors(site.cell).items():
            shape = getattr(site.cell, attribute).shape
            check_indices(f"{site.path}.diff_{leaf}.indices", tensors[f"diff_{leaf}.indices"], shape)

    @classmethod
    def initial_tensors(cls, site: Site) -> Tensors:
        config, values = site.config, {}
        for name, shape in cls.tensor_shapes(site).items():
            start = config.alpha_init if name.endswith("_alpha") else 0.0
            if name.endswith("_group"):
                start = config.alpha_init if config.structured else OPEN
            values[name] = np.full(shape, start, np.float32)
        return values

    @classmethod
    def trained(cls, site: Site, names: Collection[str]) -> frozenset[str]:
        groups = {name for name in names if name.endswith("_group") and not site.config.structured}
        return super().trained(site, names) - groups

    @classmethod
    def to_file(cls, site: Site, tensors: Tensors) -> Tensors:
        if is_sparse(tensors):
            return {k: v.astype(np.int32) if k.endswith(".indices") else v for k, v in tensors.items()}
        written: Tensors = {}
        for leaf, value in differences(site, tensors).items():
            indices = np.nonzero(value)
            written[f"diff_{leaf}.indices"] = np.stack(indices).astype(np.int32)
            written[f"diff_{leaf}.values"] = value[indices]
        return written

    @classmethod
    def merged(cls, site: Site, weights: Tensors, tensors: Tensors, shared: Tensors | None = None) -> Tensors:
        attributes = diff_tensors(site.cell)
        found = differences(site, tensors)
        return {attributes[leaf]: weights[attributes[leaf]] + value for leaf, value in found.items()}

    def configure(self, config: DiffPruningConfig, trainable: bool) -> bool:
        wanted = (config.temperature, config.gamma, config.zeta)
        changed = wanted != (self.temperature, self.gamma, self.zeta)
        self.temperature, self.gamma, self.zeta = wanted
        return changed

    # A file's sparse tensors sit in the slot as dense ones, whose gates are open or closed for good.

    def reserve(self, shapes: Shapes) -> bool:
        return False if is_sparse(shapes) else super().reserve(shapes)

    def fill(self, tensors: Mapping[str, np.ndarray], trained: frozenset[str]) -> None:
        if not is_sparse(tensors):
            super().fill(tensors, trained)
            return
        dense, names = {}, set()
        for name in (name for name in self.slot_shapes if f"{name}.values" in tensors):
            place = tuple(tensors[f"{name}.indices"])
            value, alpha = (np.full(self.slot_shapes[name], start, np.float32) for start in (0.0, -OPEN))
            value[place], alpha[place] = tensors[f"{name}.values"], OPEN
            dense |= {name: value, f"{name}_alpha": alpha, f"{name}_group": np.full(1, OPEN, np.float32)}
            names |= {name} if f"{name}.values" in trained else set()
        super().fill(dense, frozenset(names))

    def read(self, shapes: Shapes) -> Tensors:
        if not is_sparse(shapes):
            return super().read(shapes)
        found: Tensors = {}
        for name in (name for name in self.slot_shapes if f"{name}.values" in shapes):
            place = np.nonzero(self.slot(f"{name}_alpha").asnumpy() > 0)
            found[f"{name}.indices"] = np.stack(place).astype(np.int32)
            found[f"{name}.values"] = self.slot(name).asnumpy()[place]
        return found

    def gate(self, alpha: Tensor) -> Tensor:
        """Gates of the shape of their alphas, with noise in training."""
        logits = alpha + self.noise(alpha.shape) if self.training else alpha
        opened = ops.sigmoid(logits * (1.0 / self.temperature))
        return ops.clamp(opened * (self.zeta - self.gamma) + self.gamma, 0.0, 1.0)

    def weight_difference(self) -> Tensor:
        """What is added to the weight; runs inside a graph."""
        group = self.gate(self.diff_weight_group) * self.scaling
        return self.gate(self.diff_weight_alpha) * self.diff_weight * group

    def bias_difference(self) -> Tensor:
        """What is added to the bias; runs inside a graph."""
        group = self.gate(self.diff_bias_group) * self.scaling
        return self.gate(self.diff_bias_alpha) * self.diff_bias * group

    def added(self, result: Tensor, update: Tensor) -> Tensor:
        """``result`` with an update of its shape, in its own dtype."""
        return ops.cast(ops.cast(result, self.slot_dtype) + update, result.dtype)


class DiffLinear(DiffLayer):
    """A linear cell."""

    def __init__(self, base_layer: nn.Cell, *slot: Any) -> None:
        super().__init__(base_layer, *slot)
        self.transposed = is_transposed(original(base_layer))

    def construct(self, x: Tensor) -> Tensor:
        result = self.base_layer(x)
        rows = ops.reshape(ops.cast(x, self.slot_dtype), (-1, x.shape[-1]))
        difference = self.weight_difference()
        update = ops.matmul(rows, difference) if self.transposed else linear(rows, difference)
        if self.biased:
            update = ops.bias_add(update, self.bias_difference())
        return self.added(result, ops.reshape(update, result.shape))


class DiffEmbedding(DiffLayer):
    """An embedding."""

    def __init__(self, base_layer: nn.Cell, *slot: Any) -> None:
        super().__init__(base_layer, *slot)
        padding = getattr(original(base_layer), "padding_idx", None)
        self.padding = -1 if padding is None else padding
        self.tile = ops.Tile()

    def construct(self, ids: Tensor) -> Tensor:
        result = self.base_layer(ids)
        flat = ops.reshape(ids, (-1,))
        rows = ops.gather(self.weight_difference(), flat, 0)
        if self.padding >= 0:
            # As in torch, the padding token's row gets no gradient.
            held = self.tile(ops.reshape(ops.equal(flat, self.padding), (-1, 1)), (1, rows.shape[1]))
            rows = ops.select(held, ops.stop_gradient(rows), rows)
        return self.added(result, ops.reshape(rows, result.shape))


class DiffNorm(DiffLayer):
    """A normalisation cell: n * w + b with differences of w and b; n comes from a copy with w 1 and b 0."""

    def __init__(self, base_layer: nn.Cell, *slot: Any) -> None:
        super().__init__(base_layer, *slot)
        self.plain_norm = copy.deepcopy(original(base_layer))
        for leaf, attribute in diff_tensors(self.plain_norm).items():
            value = np.full(getattr(self.plain_norm, attribute).shape, float(leaf == "weight"), np.float32)
            name = self._name(f"plain_{leaf}")
            parameter = ms.Parameter(Tensor(value, self.slot_dtype), name=name, requires_grad=False)
            setattr(self.plain_norm, attribute, parameter)

    def construct(self, x: Tensor) -> Tensor:
        result = self.base_layer(x)
        update = scale_columns(self.plain_norm(ops.cast(x, self.slot_dtype)), self.weight_difference())
        if self.biased:
            update = update + every_row(self.bias_difference(), update)
        return self.added(result, update)


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
