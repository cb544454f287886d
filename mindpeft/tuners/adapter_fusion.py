"""AdapterFusion: several trained bottleneck adapters, mixed by attention in every layer.

Pfeiffer et al. 2021, "AdapterFusion: Non-Destructive Task Composition for Transfer Learning": with u_i what
the adapters' projections give, s_i = (Q q) . (K u_i), p = softmax(s / T), and V sum_i p_i u_i is added to the
residual. It is a part of a hybrid, behind the adapters that it mixes, and these are frozen. Computed as
AdapterHub's `adapters` library does: what the adapters read, the query q and the residual are those of the
last one, and their own dropout, gates and norms behind the bottleneck are left out.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, ClassVar

from mindpeft.config import PeftConfig, PeftType, add_task_heads, register_method
from mindpeft.errors import InputError
from mindpeft.tuners.base import Shapes, Slot
from mindpeft.tuners.bottleneck import BottleneckConfig
from mindpeft.tuners.fusion_layers import FusionHook, FusionLayer, Layout
from mindpeft.tuners.half_layers import follows_attention, halves, in_layout
from mindpeft.tuners.hooks import TrainingHook
from mindpeft.tuners.targeted import check_choice, check_rate, name_set

if TYPE_CHECKING:
    from mindpeft.tuners.plan import BaseModel


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
