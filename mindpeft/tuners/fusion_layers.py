"""The layers of AdapterFusion: attention over what the bottleneck adapters inside them give.

See ``mindpeft.tuners.adapter_fusion`` for the formula and its source.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, fields
from typing import Any, ClassVar

import mindspore as ms
import numpy as np
from mindspore import nn, ops

from mindpeft.ops.dropout import dropout
from mindpeft.ops.linear import linear
from mindpeft.tuners.base import Shapes, Site, Slot, Tensors
from mindpeft.tuners.bottleneck_layers import BottleneckLayer
from mindpeft.tuners.half_layers import HalfLayer, hidden_size
from mindpeft.tuners.hooks import TrainingHook

QUERY, KEY, VALUE, TEMPERATURE = (
    f"adapter_fusion.{name}" for name in ("query", "key", "value", "temperature")
)
FIRST_TEMPERATURE, _COOLING = 50.0, 0.05  # T falls by 0.05 with each step, down to 1
_PENALTY = 0.01  # of the squared distance between the value matrix and the identity


@dataclass(frozen=True)
class Layout:
    """The keys of a config that decide what the graph looks like."""

    key: bool
    query: bool
    value: bool
    query_before_ln: bool
    residual_before: bool
    temperature: bool

    @classmethod
    def of(cls, config: Any) -> Layout:
        """The layout that a config asks for."""
        return cls(**{entry.name: getattr(config, entry.name) for entry in fields(cls)})


class FusionLayer(HalfLayer):
    """Mixes the adapters that it has taken, in place of their acting one after the other."""

    LAYOUT: ClassVar[Layout]
    BUFFERS = frozenset({TEMPERATURE})
    acts = False

    def __init__(self, base_layer: nn.Cell, path: str, *slot: Any) -> None:
        super().__init__(base_layer, path, *slot)
        for entry in fields(Layout):
            setattr(self, f"has_{entry.name}", getattr(self.LAYOUT, entry.name))
        self.dropout = dropout(0.0)

    @classmethod
    def tensor_shapes(cls, site: Site) -> Shapes:
        config, size = site.config, hidden_size(site.cell)
        shapes: Shapes = {}
        for wanted, name in ((config.query, QUERY), (config.key, KEY)):
            if wanted:
                shapes |= {f"{name}.weight": (size, size), f"{name}.bias": (size,)}
        shapes |= {f"{VALUE}.weight": (size, size)} if config.value else {}
        return shapes | ({TEMPERATURE: (1,)} if config.temperature else {})

    @classmethod
    def initial_tensors(cls, site: Site) -> Tensors:
        return {
            name: cls.initial(site, name, shape).astype(np.float32)
            for name, shape in cls.tensor_shapes(site).items()
        }

    @classmethod
    def initial(cls, site: Site, name: str, shape: tuple[int, ...]) -> np.ndarray:
        """A fresh tensor."""
        if name == TEMPERATURE:
            return np.full(shape, FIRST_TEMPERATURE)
        if name.startswith(VALUE) and site.config.value_initialized:
            return np.where(np.eye(shape[0], dtype=bool), 1.0, 1e-6)  # the library's own
        return np.zeros(shape) if name.endswith("bias") else np.random.normal(0.0, 0.02, shape)

    @classmethod
    def holds(cls, room: Shapes, shapes: Shapes) -> bool:
        return room == shapes

    def configure(self, config: Any, trainable: bool) -> bool:
        changed = trainable and self.dropout.p != config.score_dropout
        if changed:
            self.dropout = dropout(config.score_dropout).set_train(self.training)
        return changed

    def take_in(self, slots: Sequence[Slot]) -> None:
        members = [slot for slot in slots if isinstance(slot, BottleneckLayer)]
        self.role, self.acts = tuple(member.label for member in members), bool(members)
        for member in members:
            member.role, member.acts = self.label, False
        for key in ("original_ln_before", "original_ln_after", "is_parallel", "skips"):
            setattr(self, key, getattr(members[-1] if members else HalfLayer, key))

    # The forward pass -------------------------------------------------------------------------------------

    def states(self, x: ms.Tensor, residual: ms.Tensor, norm_last: bool) -> tuple:
        plain, hidden, result = self.inner_states(x, residual, norm_last)
        if not self.acts:
            return plain, hidden, result
        before, skip = self.entered(hidden, residual)
        query = hidden if self.has_query_before_ln and not self.is_parallel else before
        mixed = self.mixed(before, query, skip)
        total = self.left(mixed, plain, residual, norm_last)
        return plain, self.unless_off(mixed, hidden), self.unless_off(total, result)

    def mixed(self, before: ms.Tensor, query: ms.Tensor, skip: ms.Tensor) -> ms.Tensor:
        """The mixture with the residual, all (batch, tokens, features)."""
        wide = ops.cast(skip, self.slot_dtype)
        updates = self.inner_updates(ops.cast(before, self.slot_dtype), self.label)
        values = ()
        for update in updates:
            values = (*values, update + wide) if self.has_residual_before else (*values, update)
        shares = self.shares(ops.cast(query, self.slot_dtype), values)
        mixture = self.part(shares, values, 0)
        for i in range(1, len(values)):
            mixture = mixture + self.part(shares, values, i)
        if self.has_value:  # linear: the same for the mixture as for each adapter before it
            mixture = linear(mixture, self.adapter_fusion.value.weight, None)
        mixture = mixture if self.has_residual_before else mixture + wide
        return ops.cast(mixture, skip.dtype)

    def part(self, shares: ms.Tensor, values: tuple, i: int) -> ms.Tensor:
        """What one adapter contributes."""
        return ops.tile(shares[..., i : i + 1], (1, 1, values[i].shape[-1])) * values[i]

    def shares(self, query: ms.Tensor, values: tuple) -> ms.Tensor:
        """The weights of the adapters, (batch, tokens, adapters)."""
        own = self.adapter_fusion
        if self.has_query:
            query = linear(query, own.query.weight, own.query.bias)
        scores = ()
        for value in values:
            key = linear(value, own.key.weight, own.key.bias) if self.has_key else value
            scores = (*scores, ops.ReduceSum(keep_dims=True)(query * key, -1))
        scores = self.dropout(ops.concat(scores, -1))
        if self.has_temperature:
            scores = ops.RealDiv()(scores, own.temperature)
        return ops.softmax(scores, -1)


class FusionHook(TrainingHook):
    """The penalty on value matrices far from the identity, and the temperature's fall.

    Args:
        layers: of the fusion.
        penalised: whether there is a penalty.
        cools: whether there is a temperature.
    """

    def __init__(self, layers: Collection[FusionLayer], penalised: bool, cools: bool) -> None:
        super().__init__([])
        self.matrices = tuple(layer.slot(f"{VALUE}.weight") for layer in layers) if penalised else ()
        self.temperatures = tuple(layer.slot(TEMPERATURE) for layer in layers) if cools else ()

    def penalty(self) -> ms.Tensor:
        total = ms.Tensor(0.0, ms.float32)
        for matrix in self.matrices:
            distance = ops.cast(matrix, ms.float32) - ops.eye(matrix.shape[0], matrix.shape[0], ms.float32)
            total = total + ops.ReduceSum()(distance * distance)
        return total * _PENALTY

    def after_update(self, values: tuple, gradients: tuple, step: ms.Tensor) -> None:
        for temperature in self.temperatures:
            ops.assign(temperature, ops.maximum(temperature - _COOLING, 1.0))

    def joins_kernel(self) -> bool:
        return not self.temperatures

    def state(self) -> dict[str, ms.Parameter]:
        return {temperature.name: temperature for temperature in self.temperatures}
