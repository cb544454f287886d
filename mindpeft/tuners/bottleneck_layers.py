"""Bottleneck adapters inside a transformer layer: down, activation, up, around or beside a residual.

Houlsby et al. 2019, "Parameter-Efficient Transfer Learning for NLP"; Pfeiffer et al. 2020, "AdapterFusion";
He et al. 2021, "Towards a Unified View of Parameter-Efficient Transfer Learning" (parallel adapters); Steitz
and Roth 2024, "Adapters Strike Back" (Adapter+). Computed as AdapterHub's `adapters` library does.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from functools import partial
from typing import Any, ClassVar

import mindspore as ms
import numpy as np
from mindspore import nn, ops

from mindpeft.ops.activations import ACTIVATIONS
from mindpeft.ops.dropout import dropout
from mindpeft.ops.linear import linear
from mindpeft.ops.normalization import layer_norm
from mindpeft.tuners.base import Shapes, Site, Slot, Tensors, kaiming_uniform
from mindpeft.tuners.gates import row_gates, scale_rows
from mindpeft.tuners.half_layers import HalfLayer, hidden_size, layer_of

DOWN, UP, SCALING = "adapter_down", "adapter_up", "adapter_scaling"
NORM_BEFORE, NORM_AFTER, GATE = "adapter_norm_before", "adapter_norm_after", "gate"
MODULES = (DOWN, UP, NORM_BEFORE, NORM_AFTER, GATE)
_LEAKY_RELU = partial(nn.LeakyReLU, 0.01)  # torch's own slope
NON_LINEARITIES: Mapping[str, Callable[[], nn.Cell]] = {
    **ACTIVATIONS,
    "leaky_relu": _LEAKY_RELU,
    "leakyrelu": _LEAKY_RELU,
    "linear": nn.Identity,
    "relu6": nn.ReLU6,
}
_NORM_EPSILON = 1e-5  # torch's own, which the library takes for the norms that it adds


@dataclass(frozen=True)
class Layout:
    """The keys of a config that decide what the graph looks like; no slot is for two layouts."""

    non_linearity: str
    original_ln_before: bool
    original_ln_after: bool
    ln_before: bool
    ln_after: bool
    is_parallel: bool
    scaling_kind: str  # "learned", "channel", or "number"
    use_gating: bool
    residual_before_ln: bool | str
    adapter_residual_before_ln: bool
    phm_bias: bool
    factorized_phm_W: bool
    shared_W_phm: bool
    shared_phm_rule: bool
    factorized_phm_rule: bool

    @classmethod
    def of(cls, config: Any) -> Layout:
        """The layout that a ``BottleneckConfig`` asks for."""
        kind = config.scaling if isinstance(config.scaling, str) else "number"
        names = [field.name for field in fields(cls) if field.name != "scaling_kind"]
        return cls(scaling_kind=kind, **{name: getattr(config, name) for name in names})


class BottleneckLayer(HalfLayer):
    """An adapter at the end of half a layer."""

    LAYOUT: ClassVar[Layout]

    def __init__(self, base_layer: nn.Cell, path: str, *slot: Any) -> None:
        super().__init__(base_layer, path, *slot)
        for field in fields(Layout):
            setattr(self, field.name, getattr(self.LAYOUT, field.name))
        kept = self.residual_before_ln if self.original_ln_before else True
        self.skips = {True: "hidden", False: "normed"}.get(kept, "added")
        # Then an update of zeros is the same as no adapter.
        self.is_additive = not self.ln_after and (self.is_parallel or self.skips == "hidden")
        self.activation = NON_LINEARITIES[self.non_linearity]()
        self.norm = layer_norm(_NORM_EPSILON)
        self.dropout = dropout(0.0)
        self.row_dropout = dropout(0.0)

    # What an adapter has at a site ------------------------------------------------------------------------

    @classmethod
    def width(cls, site: Site) -> int:
        """The size of the bottleneck."""
        factor = site.config.reduction_at(layer_of(site.path))
        return max(int(hidden_size(site.cell) // factor), 1)

    @classmethod
    def projection_shapes(cls, config: Any, n_in: int, n_out: int) -> Shapes:
        """The tensors of one of the two projections."""
        return {"weight": (n_out, n_in), "bias": (n_out,)}

    @classmethod
    def tensor_shapes(cls, site: Site) -> Shapes:
        config, hidden, width = site.config, hidden_size(site.cell), cls.width(site)
        modules = {
            DOWN: cls.projection_shapes(config, hidden, width),
            UP: cls.projection_shapes(config, width, hidden),
        }
        norm = {"weight": (hidden,), "bias": (hidden,)}
        modules |= {NORM_BEFORE: norm} if config.ln_before else {}
        modules |= {NORM_AFTER: norm} if config.ln_after else {}
        modules |= {GATE: {"weight": (1, hidden), "bias": (1,)}} if config.use_gating else {}
        shapes = {f"{name}.{leaf}": shape for name in modules for leaf, shape in modules[name].items()}
        if isinstance(config.scaling, str):
            shapes[SCALING] = (1,) if config.scaling == "learned" else (hidden,)
        return shapes

    @classmethod
    def initial_tensors(cls, site: Site) -> Tensors:
        seed = site.config.init_weights_seed
        random = np.random.RandomState(seed) if seed else np.random
        return {
            name: cls.initial(site, name, shape, random).astype(np.float32)
            for name, shape in cls.tensor_shapes(site).items()
        }

    @classmethod
    def initial(cls, site: Site, name: str, shape: tuple[int, ...], random: Any) -> np.ndarray:
        """A fresh tensor; ``random`` has the functions of ``numpy.random``."""
        kind, (module, _, leaf) = site.config.init_weights, name.rpartition(".")
        if module == GATE and kind == "houlsby":  # the library leaves there what torch's Linear has
            return kaiming_uniform((1, hidden_size(site.cell)), random)[:, : shape[-1]].reshape(shape)
        if name == SCALING or (module in (NORM_BEFORE, NORM_AFTER) and leaf == "weight"):
            return np.ones(shape)
        if leaf != "weight" or (module == UP and kind == "mam_adapter"):
            return np.zeros(shape)
        if module == DOWN and kind == "mam_adapter":
            return kaiming_uniform(shape, random)
        if kind == "houlsby":
            return truncated_normal(random, shape, 0.01)
        return random.normal(0.0, 0.02, shape)

    @classmethod
    def scaling_of(cls, site: Site) -> float:
        return 1.0 if isinstance(site.config.scaling, str) else float(site.config.scaling)

    @classmethod
    def holds(cls, room: Shapes, shapes: Shapes) -> bool:
        # Columns of zeros in the up-projection would be trained: sigmoid, say, is not 0 at 0.
        return room == shapes

    def take_in(self, slots: Sequence[Slot]) -> None:
        self.role, self.acts = None, True  # until a fusion further out takes it, whose label is its role then

    def configure(self, config: Any, trainable: bool) -> bool:
        rates = {"dropout": config.dropout, "row_dropout": config.stochastic_depth}
        changed = {key: rate for key, rate in rates.items() if trainable and getattr(self, key).p != rate}
        for key, rate in changed.items():
            setattr(self, key, dropout(rate).set_train(self.training))
        return bool(changed)

    @property
    def mixes_tokens(self) -> bool:
        """Whether it looks at all tokens of a text at once: see `mindpeft.nn.encoder`."""
        return self.use_gating

    # The forward pass -------------------------------------------------------------------------------------

    def states(self, x: ms.Tensor, residual: ms.Tensor, norm_last: bool) -> tuple:
        plain, hidden, result = self.inner_states(x, residual, norm_last)
        if not self.acts:
            return plain, hidden, result
        adapted = self.adapt(hidden, residual)
        total = self.left(adapted, plain, residual, norm_last)
        if not (self.is_first and self.is_additive and norm_last):
            total = self.unless_off(total, result)
        if not (self.is_first and self.is_additive and not self.is_parallel):
            adapted = self.unless_off(adapted, hidden)
        return plain, adapted, total

    def adapt(self, hidden: ms.Tensor, residual: ms.Tensor) -> ms.Tensor:
        """The adapter with the norms and the residual that belong to it."""
        before, skip = self.entered(hidden, residual)
        update = self.update(before)
        if self.is_parallel:
            return ops.cast(self.normed_update(update), hidden.dtype)
        skip = ops.cast(skip, self.slot_dtype)
        if self.adapter_residual_before_ln:
            adapted = self.normed_update(update + skip)
        else:
            adapted = self.normed_update(update) + skip
        return ops.cast(adapted, hidden.dtype)

    def normed_update(self, update: ms.Tensor) -> ms.Tensor:
        """Through the norm behind the bottleneck, if there is one."""
        if not self.ln_after:
            return update
        return self.norm(update, self.adapter_norm_after.weight, self.adapter_norm_after.bias)

    def update(self, x: ms.Tensor) -> ms.Tensor:
        """Down, activation, up, scaling, dropout, gate."""
        x = ops.cast(x, self.slot_dtype)
        update = self.dropout(self.projected(x))
        if self.use_gating:
            update = scale_rows(update, row_gates(x, self.gate.weight, self.gate.bias))
        return update

    def updates(self, x: ms.Tensor, fusion: str) -> tuple:
        found = self.inner_updates(x, fusion)
        return (*found, self.projected(x)) if self.role == fusion else found

    def projected(self, x: ms.Tensor) -> ms.Tensor:
        """Down, activation, up, scaling, for an input in the slot's dtype."""
        if self.ln_before:
            x = self.norm(x, self.adapter_norm_before.weight, self.adapter_norm_before.bias)
        return self.drop_rows(self.up(self.activation(self.down(x))))

    def down(self, x: ms.Tensor) -> ms.Tensor:
        """The projection to the bottleneck."""
        return linear(x, self.adapter_down.weight, self.adapter_down.bias)

    def up(self, inner: ms.Tensor) -> ms.Tensor:
        """The projection back, scaled."""
        return self.scaled(inner, self.adapter_up.weight, self.adapter_up.bias)

    def scaled(self, inner: ms.Tensor, weight: ms.Tensor, bias: ms.Tensor | None) -> ms.Tensor:
        """``scaling * (inner @ weight.T + bias)``, scaled where the numbers are fewest."""
        factor = self.scaling
        if self.scaling_kind == "learned":
            factor = factor * self.adapter_scaling
        if self.scaling_kind == "channel":
            weight = weight * ops.tile(self.adapter_scaling.reshape((-1, 1)), (1, weight.shape[1]))
            bias = None if bias is None else bias * self.adapter_scaling
        return linear(inner * factor, weight, None if bias is None else bias * factor)

    def drop_rows(self, update: ms.Tensor) -> ms.Tensor:
        """Stochastic depth (Huang et al., 2016): leave the adapter out for some rows of the batch."""
        if not self.training or self.row_dropout.p == 0.0:
            return update
        return scale_rows(update, self.row_dropout(ops.ones((update.shape[0], 1), update.dtype)))


def truncated_normal(random: Any, shape: tuple[int, ...], deviation: float) -> np.ndarray:
    """Normal numbers of which those beyond two deviations are drawn again."""
    values = random.normal(0.0, deviation, shape)
    while (outside := np.abs(values) > 2 * deviation).any():
        values[outside] = random.normal(0.0, deviation, outside.sum())
    return values
