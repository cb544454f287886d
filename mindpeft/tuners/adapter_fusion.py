"""AdapterFusion: several trained bottleneck adapters, mixed by attention in every layer.

Pfeiffer et al. 2021, "AdapterFusion: Non-Destructive Task Composition for Transfer Learning": with u_i what
the adapters' projections give, s_i = (Q q) . (K u_i), p = softmax(s / T), and V sum_i p_i u_i is added to the
residual. It is a part of a hybrid, behind the adapters that it mixes, and these are frozen. Computed as
AdapterHub's `adapters` library does: what the adapters read, the query q and the residual are those of the
last one, and their own dropout, gates and norms behind the bottleneck are left out.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any, ClassVar

import mindspore as ms
import numpy as np
from mindspore import nn, ops

from mindpeft.config import PeftConfig, PeftType, add_task_heads, register_method
from mindpeft.errors import InputError
from mindpeft.ops.dropout import dropout
from mindpeft.ops.linear import linear
from mindpeft.tuners.base import Shapes, Site, Slot, Tensors
from mindpeft.tuners.bottleneck import BottleneckConfig
from mindpeft.tuners.bottleneck_layers import BottleneckLayer
from mindpeft.tuners.half_layers import HalfLayer, follows_attention, halves, hidden_size, in_layout
from mindpeft.tuners.hooks import TrainingHook
from mindpeft.tuners.targeted import check_choice, check_rate, name_set

if TYPE_CHECKING:
    from mindpeft.tuners.plan import BaseModel

QUERY, KEY, VALUE, TEMPERATURE = (
    f"adapter_fusion.{name}" for name in ("query", "key", "value", "temperature")
)
FIRST_TEMPERATURE, _COOLING = 50.0, 0.05  # T falls by 0.05 with each step, down to 1
_PENALTY = 0.01  # of the squared distance between the value matrix and the identity


@register_method
@dataclass
class AdapterFusionConfig(PeftConfig):
    """AdapterFusion, keys as in AdapterHub's `adapters`; the defaults are those of its "dynamic" fusion.

    Attributes:
        key: a matrix for what the adapters give, in the scores.
        query: a matrix for what they read, in the scores.
        value: a matrix for what they give, in the mixture.
        query_before_ln: the query is what the half layer gives, before the adapter's residual and norm.
        regularization: keep the value matrix near the identity by a term of the loss. (The library does so
            whatever this says.)
        residual_before: add the residual to what each adapter gives, in keys and values, not to the mixture.
        temperature: divide the scores by a temperature that falls from 50 to 1 while training. (In the
            library it falls with every forward pass, and its files don't keep it: from there it is 50 again.)
        value_before_softmax: in the library, where the value matrix is applied; the mixture is the same.
        value_initialized: the value matrix begins as the identity.
        dropout_prob: the rate of dropout on the scores; ``None``: that of the model's attention.
        adapter_names: what the mixed adapters are called, in their order.
        mh_adapter: they act behind the attention of each layer.
        output_adapter: they act behind the feed-forward half of each layer.
        train_adapters: train the mixed adapters too.
        modules_to_save: cells trained and saved whole (a fresh head).

    Raises:
        InputError: a value is not allowed, or there would be nothing to train.
    """

    key: bool = True
    query: bool = True
    value: bool = True
    query_before_ln: bool = False
    regularization: bool = True
    residual_before: bool = False
    temperature: bool = False
    value_before_softmax: bool = True
    value_initialized: bool = True
    dropout_prob: float | None = None
    adapter_names: list[str] = field(default_factory=list)
    mh_adapter: bool = False
    output_adapter: bool = True
    train_adapters: bool = False
    modules_to_save: list[str] | None = None

    METHOD: ClassVar[PeftType] = PeftType.ADAPTER_FUSION
    IN_PEFT: ClassVar[bool] = False

    def __post_init__(self) -> None:
        super().__post_init__()
        name_set(self.modules_to_save, "modules_to_save", allow_text=False)
        self.modules_to_save = add_task_heads(self.task_type, self.modules_to_save)
        for entry in fields(self):
            if entry.type == "bool":
                check_choice(entry.name, getattr(self, entry.name), (True, False))
        if not (self.key or self.query or self.value):
            raise InputError("key, query or value must be true: there would be nothing to train")
        if self.dropout_prob is not None:
            check_rate("dropout_prob", self.dropout_prob)
        name_set(self.adapter_names, "adapter_names", allow_text=False)
        if len(set(self.adapter_names)) < len(self.adapter_names):
            raise InputError(f"adapter_names must be different names, not {self.adapter_names}")
        if not (self.mh_adapter or self.output_adapter):
            raise InputError("mh_adapter or output_adapter must be true, as in the adapters that are mixed")

    def frozen_parts(self, earlier: Sequence[PeftConfig]) -> list[int]:
        mixed = [i for i, config in enumerate(earlier) if isinstance(config, BottleneckConfig)]
        if len(mixed) != len(self.adapter_names) or len(mixed) < len(earlier):
            raise InputError(
                f"ADAPTER_FUSION mixes {', '.join(map(repr, self.adapter_names))}: it must follow as many "
                f"parts of BOTTLENECK and nothing else, but follows {[c.peft_type.value for c in earlier]}"
            )
        for key in ("mh_adapter", "output_adapter"):
            if {getattr(config, key) for config in earlier} != {getattr(self, key)}:
                raise InputError(f"{key} must be the same in all adapters that are mixed and in the mixture")
        return [] if self.train_adapters else mixed

    def resolve(self, base: BaseModel) -> None:
        rate = getattr(getattr(base.model, "config", None), "attention_probs_dropout_prob", 0.0)
        self.score_dropout = self.dropout_prob or rate

    def slot_classes(self, base: BaseModel) -> dict[str, type[Slot]]:
        kind = in_layout(FusionLayer, Layout.of(self))
        places = halves(base.cells)
        return {
            path: kind
            for path in places
            if (self.mh_adapter if follows_attention(path) else self.output_adapter)
        }

    def training_hook(self, slots: Mapping[str, Slot], shapes: Mapping[str, Shapes]) -> TrainingHook | None:
        penalised = self.value and self.regularization
        if not (penalised or self.temperature):
            return None
        return FusionHook(list(slots.values()), penalised, self.temperature)


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
    def of(cls, config: AdapterFusionConfig) -> Layout:
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

    def configure(self, config: AdapterFusionConfig, trainable: bool) -> bool:
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

    def state(self) -> dict[str, ms.Parameter]:
        return {temperature.name: temperature for temperature in self.temperatures}
