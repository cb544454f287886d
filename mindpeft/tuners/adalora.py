"""AdaLoRA: LoRA as a singular value decomposition, W + B diag(E) A, whose rank is pruned in training.

Zhang et al. 2023, "AdaLoRA: Adaptive Budget Allocation for Parameter-Efficient Fine-Tuning". After each
update, inside the compiled step, the importance of every triplet (a row of A, a column of B, and the value
in E between them) is smoothed; the least important ones over all layers lose their value, so that the sum of
the ranks follows a cubic schedule down to the budget. A term of the training loss keeps A and B orthogonal.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import mindspore as ms
import numpy as np
from mindspore import nn, ops

from mindpeft.config import PeftType, register_method
from mindpeft.errors import InputError
from mindpeft.tuners.adalora_pruning import RankAllocation
from mindpeft.tuners.base import Shapes, Site, Slot, Tensors, TunerLayer, check_linear, linear_features
from mindpeft.tuners.hooks import TrainingHook
from mindpeft.tuners.lora import LoraConfig
from mindpeft.tuners.lora_layers import LoraLinear
from mindpeft.tuners.targeted import check_count, check_number

_QV = "q_proj v_proj"
_TARGETS = {
    "t5": "q k v o wi wo",
    "mt5": "q k v o wi_0 wi_1 wo",
    "bart opt": "q_proj k_proj v_proj out_proj fc1 fc2",
    "gpt2 gpt_bigcode": "c_attn",
    "bloom gpt_neox": "query_key_value",
    "gptj gpt_neo llama llama4 gemma gemma2 gemma3_text qwen2 qwen3": _QV,
    "bert": "query value",
    "roberta": "query key value dense",
    "deberta-v2": "query_proj key_proj value_proj dense",
    "deberta": "in_proj",
    "nemotron_h": "q_proj k_proj v_proj o_proj",
}
ADALORA_TARGETS: dict[str, list[str] | str] = {
    "gemma4": r".*language_model\..*\.(q_proj|v_proj)",
    **{model: names.split() for models, names in _TARGETS.items() for model in models.split()},
}
# LoRA's keys that PEFT's AdaLoRA lets stand without effect.
_WITHOUT_EFFECT = ("use_dora", "use_rslora", "lora_bias", "alpha_pattern")


@register_method
@dataclass
class AdaLoraConfig(LoraConfig):
    """Hugging Face PEFT's configuration of AdaLoRA, key by key: LoRA's keys and those below.

    Attributes:
        r: not used; ``init_r`` and ``target_r`` are.
        lora_alpha: the factor is lora_alpha / init_r, also after pruning; ``init_r`` for 0 and less.
        target_r: the mean rank to arrive at.
        init_r: the rank of every layer at the start.
        tinit: updates before the pruning begins.
        tfinal: updates at the end, after it is finished.
        deltaT: updates between two prunings.
        beta1, beta2: smoothing of the importance, and of its uncertainty.
        orth_reg_weight: the weight of the term that keeps A and B orthogonal.
        total_step: the updates of the whole training.
        rank_pattern: which of the initial ranks are left, by layer; written by training.

    Raises:
        InputError: a value is not allowed, or the schedule leaves no update for pruning.
    """

    target_r: int = 8
    init_r: int = 12
    tinit: int = 0
    tfinal: int = 0
    deltaT: int = 1
    beta1: float = 0.85
    beta2: float = 0.85
    orth_reg_weight: float = 0.5
    total_step: int | None = None
    rank_pattern: dict[str, list[bool]] | None = None

    METHOD: ClassVar[PeftType] = PeftType.ADALORA
    EXAMPLE: ClassVar[Mapping[str, Any]] = {"total_step": 1000}
    DEFAULT_TARGETS: ClassVar = ADALORA_TARGETS

    def __post_init__(self) -> None:
        pattern, self.rank_pattern = self.rank_pattern, None  # not LoRA's
        super().__post_init__()
        masks = pattern.values() if isinstance(pattern, dict) else [pattern or []]
        if not all(isinstance(mask, list) and all(type(kept) is bool for kept in mask) for mask in masks):
            raise InputError(f"rank_pattern must map names to lists of true and false, not {pattern!r}")
        self.rank_pattern = pattern or None
        self._check_schedule()

    def _check_extensions(self) -> None:
        super()._check_extensions()
        for key in _WITHOUT_EFFECT:
            if getattr(self, key):
                raise InputError(f"AdaLoRA does not know {key}; leave it out")
        if not isinstance(self.init_lora_weights, bool):
            raise InputError(f"AdaLoRA's init_lora_weights is true or false, not {self.init_lora_weights!r}")

    def _check_schedule(self) -> None:
        for key in ("target_r", "init_r", "deltaT"):
            check_count(key, getattr(self, key))
        for key in ("tinit", "tfinal"):
            check_count(key, getattr(self, key), least=0)
        check_count("total_step", self.total_step)
        check_number("orth_reg_weight", self.orth_reg_weight)
        if self.orth_reg_weight < 0:
            raise InputError(f"orth_reg_weight must not be negative, and is {self.orth_reg_weight}")
        for key in ("beta1", "beta2"):
            check_number(key, getattr(self, key))
            if not 0 < getattr(self, key) < 1:
                raise InputError(f"{key} must lie between 0 and 1, and is {getattr(self, key)}")
        if self.tinit >= self.total_step - self.tfinal:
            raise InputError(
                f"the schedule leaves no update for pruning: tinit={self.tinit} and tfinal={self.tfinal} "
                f"fill total_step={self.total_step}"
            )

    def roomy(self, slot_rank: int) -> AdaLoraConfig:
        return replace(self, init_r=slot_rank, target_r=min(self.target_r, slot_rank), rank_pattern=None)

    def slot_class(self, cell: nn.Cell, path: str) -> type[TunerLayer]:
        check_linear(cell, path, "AdaLoRA")
        return AdaLoraLinear

    def training_hook(self, slots: Mapping[str, Slot], shapes: Mapping[str, Shapes]) -> TrainingHook:
        if self.target_r > self.init_r:  # PEFT writes such files; it can't train them either
            raise InputError(f"target_r={self.target_r} must not be more than init_r={self.init_r}")
        layers = {path: slot for path, slot in slots.items() if isinstance(slot, AdaLoraLinear)}
        return RankAllocation(self, layers, {path: shapes[path]["lora_E"][0] for path in layers})

    def left(self, path: str) -> list[bool] | None:
        """Which ranks of a layer are left, if it was pruned."""
        return (self.rank_pattern or {}).get(f"{path}.lora_E")

    def budgets(self, start: int, layers: int) -> list[int]:
        """For each update up to the last pruning how many triplets to prune; -1 for those without pruning.

        Args:
            start: all triplets.
            layers: how many layers have them.
        """
        target, last = min(self.target_r * layers, start), self.total_step - self.tfinal
        pruned = [-1] * (last + 1)
        for step in range(self.tinit + 1, last + 1):
            if step % self.deltaT == 0 or step == last:
                rest = 1 - (step - self.tinit) / (last - self.tinit)
                pruned[step] = start - int((start - target) * rest**3 + target)
        return pruned


class AdaLoraLinear(LoraLinear):
    """AdaLoRA on a linear cell: A (r, in), E (r, 1), B (out, r)."""

    NAMES = ("lora_A", "lora_B")
    VALUES = "lora_E"

    def __init__(self, base_layer: nn.Cell, *slot: Any) -> None:
        super().__init__(base_layer, *slot)
        self.join()

    @classmethod
    def _shapes(cls, site: Site, rank: int) -> Shapes:
        n_in, n_out = linear_features(site.cell)
        return {"lora_A": (rank, n_in), "lora_E": (rank, 1), "lora_B": (n_out, rank)}

    @classmethod
    def tensor_shapes(cls, site: Site) -> Shapes:
        return cls._shapes(site, site.config.init_r)

    @classmethod
    def file_shapes(cls, site: Site) -> Shapes:
        left = site.config.left(site.path)
        return cls._shapes(site, site.config.init_r if left is None else sum(left))

    @classmethod
    def to_file(cls, site: Site, tensors: Tensors) -> Tensors:
        left = site.config.left(site.path)
        if left is None or len(left) != len(tensors[cls.VALUES]):
            return tensors  # never pruned, or cut already
        return {name: value[:, left] if name == "lora_B" else value[left] for name, value in tensors.items()}

    @classmethod
    def scaling_of(cls, site: Site) -> float:
        config = site.config
        return (config.lora_alpha if config.lora_alpha > 0 else config.init_r) / (config.init_r + 1e-5)

    @classmethod
    def initial_tensors(cls, site: Site) -> Tensors:
        spread = {"lora_A": 0.02, "lora_E": 0.0, "lora_B": 0.02}
        return {
            name: np.random.normal(0, spread[name] if site.config.init_lora_weights else 1, shape).astype(
                np.float32
            )
            for name, shape in cls.tensor_shapes(site).items()
        }

    @classmethod
    def product(cls, site: Site, tensors: Tensors) -> np.ndarray:
        a, e, b = (tensors[name].astype(np.float32) for name in ("lora_A", "lora_E", "lora_B"))
        return (b @ (a * e)) * np.float32(cls.scaling_of(site))

    def reserve(self, shapes: Shapes) -> bool:
        # A layer that was pruned to nothing keeps room for one rank: MindSpore has no empty parameters.
        return super().reserve({name: tuple(max(1, n) for n in shape) for name, shape in shapes.items()})

    def pair(self) -> tuple[ms.Tensor, ms.Tensor]:
        return self.lora_A * self.lora_E, self.lora_B

    def update(self, x: ms.Tensor) -> ms.Tensor:
        factors = ops.reshape(self.lora_E, (-1,)) * self.scaling
        return self.linear(self.scale_columns(self.linear(x, self.lora_A), factors), self.lora_B)
