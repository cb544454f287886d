"""The layers of diff pruning: differences with gates around linear, embedding and normalisation cells."""

from __future__ import annotations

import copy
import math
from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING, Any

import mindspore as ms
import numpy as np
from mindspore import Tensor, nn, ops

from mindpeft.ops.activations import activation
from mindpeft.ops.columns import every_row
from mindpeft.ops.random import standard_normal
from mindpeft.parameters import CLASSIC_NAMES
from mindpeft.tuners.base import Shapes, Site, Tensors, TunerLayer, is_transposed, original
from mindpeft.tuners.delta import DeltaLayer
from mindpeft.tuners.diff_pruning_sparse import check_indices, is_sparse

if TYPE_CHECKING:
    from mindpeft.tuners.diff_pruning import DiffPruningConfig


OPEN = 100.0  # an alpha that opens a gate for good; its negative closes it


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
        self.normal = standard_normal()

    def construct(self, shape: tuple[int, ...]) -> Tensor:
        chance = (ops.erf(self.normal(shape) * math.sqrt(0.5)) + 1.0) * 0.5
        chance = ops.clamp(chance, 1e-6, 1.0 - 1e-6)
        return ops.log(chance) - ops.log(1.0 - chance)


class DiffLayer(TunerLayer):
    """Differences w, their gates' alphas of the same shape, and the alpha of the whole tensor's gate (1)."""

    BUFFERS = frozenset(f"diff_{leaf}.indices" for leaf in ("weight", "bias"))

    def __init__(self, base_layer: nn.Cell, path: str, shapes: Shapes, *slot: Any) -> None:
        super().__init__(base_layer, path, dense_shapes(original(base_layer)), *slot)
        self.noise, self.sigmoid = LogisticNoise(), activation("sigmoid")
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
        opened = self.sigmoid(logits * (1.0 / self.temperature))
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


class DiffLinear(DiffLayer, DeltaLayer):
    """A linear cell."""

    def __init__(self, base_layer: nn.Cell, *slot: Any) -> None:
        super().__init__(base_layer, *slot)
        self.transposed = is_transposed(original(base_layer))

    def construct(self, x: Tensor) -> Tensor:
        result = self.weighted(x)
        if not self.biased:
            return result
        rows = ops.reshape(ops.cast(result, self.slot_dtype), (-1, result.shape[-1]))
        rows = ops.bias_add(rows, self.bias_difference())
        return ops.cast(ops.reshape(rows, result.shape), result.dtype)

    def weighted(self, x: Tensor) -> Tensor:
        """The cell's result with the changed weight; runs inside a graph."""
        difference = self.weight_difference()
        if not self.transposed:
            return self.with_delta(x, difference)
        rows = ops.reshape(ops.cast(x, self.slot_dtype), (-1, x.shape[-1]))
        return self.beside(x, ops.reshape(ops.matmul(rows, difference), (*x.shape[:-1], difference.shape[1])))


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
        update = self.scale_columns(self.plain_norm(ops.cast(x, self.slot_dtype)), self.weight_difference())
        if self.biased:
            update = update + every_row(self.bias_difference(), update)
        return self.added(result, update)
