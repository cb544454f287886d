"""LoRA: a frozen matrix plus a trained product of two thin ones, y = W x + s B A x.

Hu et al. 2021, "LoRA: Low-Rank Adaptation of Large Language Models"; s = alpha / r, or alpha / sqrt(r) for
rank-stabilised LoRA (Kalajdzievski 2023).
"""

from __future__ import annotations

import logging
import math
from dataclasses import MISSING, dataclass, field, fields, replace
from typing import TYPE_CHECKING, ClassVar

from mindspore import nn

from mindpeft.config import PeftType, register_method
from mindpeft.errors import InputError
from mindpeft.targets import pattern_value
from mindpeft.tuners.base import (
    Tensors,
    TunerLayer,
    check_linear,
    is_embedding,
    is_linear,
    is_transposed,
    refuse_cell,
)
from mindpeft.tuners.dora import DoraEmbedding, DoraLinear
from mindpeft.tuners.lora_conv import LoraConv1d, LoraConv2d, is_convolution
from mindpeft.tuners.lora_init import as_ordinary, check_initialisation
from mindpeft.tuners.lora_layers import LoraEmbedding, LoraLinear
from mindpeft.tuners.lora_parameter import AdaptsParameters
from mindpeft.tuners.lora_subconfigs import EvaConfig, LoftQConfig, sub_config
from mindpeft.tuners.targeted import TargetedConfig, check_count, check_number, check_rate
from mindpeft.tuners.trainable_tokens import TrainsTokens

if TYPE_CHECKING:
    from mindpeft.tuners.base import Slot
    from mindpeft.tuners.plan import BaseModel

# Keys of the format that change what is computed and that ordinary LoRA leaves at their defaults.
_EXTENSIONS = (
    "megatron_config",
    "loftq_config",
    "eva_config",
    "corda_config",
    "lora_ga_config",
    "velora_config",
    "alora_invocation_tokens",
    "use_qalora",
    "monteclora_config",
    "layer_replication",
    "use_bdlora",
    "arrow_config",
    "kasa_config",
    "ensure_weight_tying",
)

logger = logging.getLogger(__name__)


@register_method
@dataclass
class LoraConfig(TrainsTokens, AdaptsParameters, TargetedConfig):
    """Hugging Face PEFT's configuration of ordinary LoRA, key by key.

    Attributes:
        r: the rank.
        target_modules: names or dotted suffixes of cells, or a regular expression for the full path, or
            "all-linear"; ``None`` takes the model type's default.
        exclude_modules: cells never targeted, given the same way.
        lora_alpha: the scaling's numerator.
        lora_dropout: dropout on the input of A while training.
        fan_in_fan_out: the weights are (in, out); set from the cells themselves.
        bias: which of the base model's biases are trained: "none", "all", "lora_only".
        use_rslora: scale by alpha / sqrt(r).
        modules_to_save: cells trained and saved whole (a fresh head).
        init_lora_weights: ``True`` (B zero), ``False`` (both random), "gaussian" (A normal, std 1/r),
            "orthogonal"; "eva", which begins as ``True`` until ``initialize_lora_eva_weights`` is called with
            data; or "pissa", "pissa_niter_N" (a faster, rougher decomposition of N iterations) and "olora",
            which take the fresh adapter out of the base model's weights while it is active; or "loftq", which
            quantises those weights while the adapter is active (see ``loftq_config``).
        loftq_config: a ``LoftQConfig``, or its keys and values.
        eva_config: an ``EvaConfig``, or its keys and values.
        layers_to_transform: only these layer indices; needs a list of targets.
        layers_pattern: the name before the layer index.
        trainable_token_indices: ids of tokens whose rows of the input embedding are trained besides, or such
            ids by the names of embeddings.
        rank_pattern: regular expression for the end of a name -> its rank.
        alpha_pattern: regular expression for the end of a name -> its alpha.
        target_parameters: names or dotted suffixes of parameters of two axes, or of three with a matrix for
            each expert, that are adapted where they are; ``target_modules=[]`` then means no cell besides.
        lora_bias: give B a bias.
        use_dora: DoRA: the length of each row of the weight is a trained vector of its own.

    The other keys belong to extensions of LoRA; any value but the default is refused by name.

    Raises:
        InputError: a value is not allowed, or keys contradict each other.
    """

    r: int = 8
    exclude_modules: set[str] | list[str] | str | None = None
    lora_alpha: float = 8
    lora_dropout: float = 0.0
    fan_in_fan_out: bool = False
    bias: str = "none"
    use_rslora: bool = False
    init_lora_weights: bool | str = True
    layers_to_transform: list[int] | int | None = None
    layers_pattern: list[str] | str | None = None
    rank_pattern: dict[str, int] = field(default_factory=dict)
    alpha_pattern: dict[str, float] = field(default_factory=dict)
    megatron_config: dict | None = None
    megatron_core: str | None = "megatron.core"
    trainable_token_indices: list[int] | dict[str, list[int]] | None = None
    loftq_config: dict | LoftQConfig = field(default_factory=dict)
    eva_config: dict | EvaConfig | None = None
    corda_config: dict | None = None
    lora_ga_config: dict | None = None
    use_dora: bool = False
    velora_config: dict | None = None
    alora_invocation_tokens: list[int] | None = None
    use_qalora: bool = False
    qalora_group_size: int = 16
    monteclora_config: dict | None = None
    layer_replication: list[tuple[int, int]] | None = None
    lora_bias: bool = False
    target_parameters: list[str] | None = None
    use_bdlora: dict | None = None
    arrow_config: dict | None = None
    kasa_config: dict | None = None
    ensure_weight_tying: bool = False

    METHOD: ClassVar[PeftType] = PeftType.LORA

    def __post_init__(self) -> None:
        super().__post_init__()
        self.rank_pattern = self.rank_pattern or {}
        self.alpha_pattern = self.alpha_pattern or {}
        self._read_loftq()
        self.eva_config = sub_config("eva_config", self.eva_config, EvaConfig)
        if self.init_lora_weights == "eva" and self.eva_config is None:
            self.eva_config = EvaConfig()
        self._check_extensions()
        self.check_token_indices()
        self.check_target_parameters()
        self._check_numbers()
        self._check_choices()

    def _read_loftq(self) -> None:
        if self.init_lora_weights != "loftq":
            return
        if not self.loftq_config:
            raise InputError('init_lora_weights="loftq" needs loftq_config, such as {"loftq_bits": 4}')
        self.loftq_config = sub_config("loftq_config", self.loftq_config, LoftQConfig)
        if self.use_dora:
            raise InputError('init_lora_weights="loftq" and use_dora can\'t be used together')

    def _check_extensions(self) -> None:
        defaults = {
            f.name: f.default if f.default_factory is MISSING else f.default_factory() for f in fields(self)
        }
        for key in _EXTENSIONS:
            value = getattr(self, key)
            if key == f"{self.init_lora_weights}_config":
                continue
            if value not in (defaults[key], None, False) and value != {}:
                raise InputError(
                    f"{key}={value!r} is not supported; only ordinary LoRA is (leave it at {defaults[key]!r})"
                )

    def _check_numbers(self) -> None:
        ranks = {"r": self.r, **{f"rank_pattern[{key!r}]": rank for key, rank in self.rank_pattern.items()}}
        for key, rank in ranks.items():
            check_count(key, rank)
        check_number("lora_alpha", self.lora_alpha)
        for key, alpha in self.alpha_pattern.items():
            check_number(f"alpha_pattern[{key!r}]", alpha)
        check_rate("lora_dropout", self.lora_dropout)

    def _check_choices(self) -> None:
        if isinstance(self.init_lora_weights, str):
            self.init_lora_weights = self.init_lora_weights.lower()
        check_initialisation(self.init_lora_weights)
        if self.lora_bias and not isinstance(self.init_lora_weights, bool):
            raise InputError(
                f"lora_bias needs init_lora_weights true or false, not {self.init_lora_weights!r}"
            )
        if self.init_lora_weights == "loftq" and self.scaling_at("", self.r) != 1:
            logger.warning("LoftQ corrects the weights for a scaling of 1, and lora_alpha is for another")
        if self.lora_bias and self.use_dora:
            raise InputError("lora_bias and use_dora can't be used together")

    def converted(
        self, tensors: dict[str, Tensors], initial: dict[str, Tensors]
    ) -> tuple[LoraConfig, dict[str, Tensors]]:
        return as_ordinary(self, tensors, initial)

    def check_file(self) -> None:
        if str(self.init_lora_weights).startswith("pissa_niter"):
            logger.warning(
                "init_lora_weights=%r: what it took out of the base model's weights is worked out anew; that "
                "is exact for an adapter made here, and approximate for PEFT's, which decomposes at random",
                self.init_lora_weights,
            )

    def scaling_at(self, path: str, rank: int) -> float:
        """The factor of B A at a path, for its rank."""
        alpha = pattern_value(self.alpha_pattern, path, self.lora_alpha)
        return alpha / (math.sqrt(rank) if self.use_rslora else rank)

    def roomy(self, slot_rank: int) -> LoraConfig:
        return replace(self, r=slot_rank, rank_pattern={})

    def slot_classes(self, base: BaseModel) -> dict[str, type[Slot]]:
        classes = super().slot_classes(base)
        classes |= self.token_slots(base, classes)
        return classes | self.parameter_slots(base, classes)

    def slot_class(self, cell: nn.Cell, path: str) -> type[TunerLayer]:
        if is_linear(cell):
            check_linear(cell, path, "LoRA")
            if self.init_lora_weights in ("olora", "loftq") and is_transposed(cell):
                raise InputError(
                    f"init_lora_weights={self.init_lora_weights!r} is not possible for {path!r}, whose "
                    "weight is (in, out)"
                )
            return DoraLinear if self.use_dora else LoraLinear
        if is_embedding(cell):
            for key, used in (
                ("lora_bias", self.lora_bias),
                ('init_lora_weights="loftq"', self.init_lora_weights == "loftq"),
            ):
                if used:
                    raise InputError(f"{key} is not possible for the embedding {path!r}")
            return DoraEmbedding if self.use_dora else LoraEmbedding
        if is_convolution(cell):
            kind = LoraConv1d if isinstance(cell, nn.Conv1d) else LoraConv2d
            kind.check(self, cell, path)
            return kind
        raise refuse_cell(cell, path, "LoRA", "linear and embedding cells, nn.Conv1d and nn.Conv2d")
