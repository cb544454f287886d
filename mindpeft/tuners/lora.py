"""LoRA: a frozen matrix plus a trained product of two thin ones, y = W x + s B A x.

Hu et al. 2021, "LoRA: Low-Rank Adaptation of Large Language Models"; s = alpha / r, or alpha / sqrt(r) for
rank-stabilised LoRA (Kalajdzievski 2023).
"""

from __future__ import annotations

import logging
import math
from dataclasses import MISSING, dataclass, field, fields
from typing import Any, ClassVar

import mindspore as ms
import numpy as np
from mindspore import nn, ops

from mindpeft.config import PeftConfig, PeftType, add_task_heads, register_method
from mindpeft.errors import InputError, did_you_mean
from mindpeft.ops.dropout import dropout
from mindpeft.ops.linear import linear
from mindpeft.targets import pattern_value
from mindpeft.tuners.base import (
    Shapes,
    Tensors,
    TunerLayer,
    is_embedding,
    is_linear,
    is_transposed,
    linear_features,
    refuse_cell,
    weight_attribute,
)

logger = logging.getLogger(__name__)

BIAS_KINDS = ("none", "all", "lora_only")

# Keys of the format that change what is computed and that ordinary LoRA leaves at their defaults.
_EXTENSIONS = (
    "megatron_config",
    "trainable_token_indices",
    "loftq_config",
    "eva_config",
    "corda_config",
    "lora_ga_config",
    "use_dora",
    "velora_config",
    "alora_invocation_tokens",
    "use_qalora",
    "monteclora_config",
    "layer_replication",
    "target_parameters",
    "use_bdlora",
    "arrow_config",
    "kasa_config",
    "ensure_weight_tying",
)


@register_method
@dataclass
class LoraConfig(PeftConfig):
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
        init_lora_weights: ``True`` (B zero), ``False`` (both random), "gaussian" (A normal, std 1/r).
        layers_to_transform: only these layer indices; needs a list of targets.
        layers_pattern: the name before the layer index.
        rank_pattern: regular expression for the end of a name -> its rank.
        alpha_pattern: regular expression for the end of a name -> its alpha.
        lora_bias: give B a bias.

    The other keys belong to extensions of LoRA; any value but the default is refused by name.

    Raises:
        InputError: a value is not allowed, or keys contradict each other.
    """

    r: int = 8
    target_modules: set[str] | list[str] | str | None = None
    exclude_modules: set[str] | list[str] | str | None = None
    lora_alpha: float = 8
    lora_dropout: float = 0.0
    fan_in_fan_out: bool = False
    bias: str = "none"
    use_rslora: bool = False
    modules_to_save: list[str] | None = None
    init_lora_weights: bool | str = True
    layers_to_transform: list[int] | int | None = None
    layers_pattern: list[str] | str | None = None
    rank_pattern: dict[str, int] = field(default_factory=dict)
    alpha_pattern: dict[str, float] = field(default_factory=dict)
    megatron_config: dict | None = None
    megatron_core: str | None = "megatron.core"
    trainable_token_indices: list[int] | dict[str, list[int]] | None = None
    loftq_config: dict = field(default_factory=dict)
    eva_config: dict | None = None
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
        self.target_modules = _names(self.target_modules, "target_modules")
        self.exclude_modules = _names(self.exclude_modules, "exclude_modules")
        self.rank_pattern = self.rank_pattern or {}
        self.alpha_pattern = self.alpha_pattern or {}
        self._check_extensions()
        self._check_numbers()
        self._check_choices()
        self._check_layers()
        saved = _names(self.modules_to_save, "modules_to_save", allow_text=False)
        self.modules_to_save = add_task_heads(
            self.task_type, None if saved is None else list(self.modules_to_save)
        )

    def _check_extensions(self) -> None:
        defaults = {
            f.name: f.default if f.default_factory is MISSING else f.default_factory() for f in fields(self)
        }
        for key in _EXTENSIONS:
            value = getattr(self, key)
            if value not in (defaults[key], None, False) and value != {}:
                raise InputError(
                    f"{key}={value!r} is not supported; only ordinary LoRA is (leave it at {defaults[key]!r})"
                )

    def _check_numbers(self) -> None:
        for key, rank in {
            "r": self.r,
            **{f"rank_pattern[{k!r}]": v for k, v in self.rank_pattern.items()},
        }.items():
            if type(rank) is not int or rank <= 0:
                raise InputError(f"{key} must be a positive integer, not {rank!r}")
        for key, alpha in {"lora_alpha": self.lora_alpha, **self.alpha_pattern}.items():
            if isinstance(alpha, bool) or not isinstance(alpha, int | float) or not math.isfinite(alpha):
                raise InputError(f"{key} must be a number, not {alpha!r}")
        rate = self.lora_dropout
        if isinstance(rate, bool) or not isinstance(rate, int | float) or not 0 <= rate < 1:
            raise InputError(f"lora_dropout must lie in [0, 1), not {rate!r}")

    def _check_choices(self) -> None:
        if self.bias not in BIAS_KINDS:
            raise InputError(
                f"bias must be one of {', '.join(BIAS_KINDS)}, not {self.bias!r}"
                f"{did_you_mean(self.bias, BIAS_KINDS)}"
            )
        if isinstance(self.init_lora_weights, str):
            self.init_lora_weights = self.init_lora_weights.lower()
        if self.init_lora_weights not in (True, False, "gaussian"):
            raise InputError(
                f"init_lora_weights={self.init_lora_weights!r} is not supported; "
                'allowed: true, false, "gaussian"'
            )
        if self.lora_bias and self.init_lora_weights == "gaussian":
            raise InputError('lora_bias needs init_lora_weights true or false, not "gaussian"')

    def _check_layers(self) -> None:
        for key in ("layers_to_transform", "layers_pattern"):
            if isinstance(self.target_modules, str) and getattr(self, key) is not None:
                raise InputError(f"{key} can't be used when target_modules is a string; give a list of names")
        if self.layers_pattern and self.layers_to_transform is None:
            raise InputError("layers_pattern needs layers_to_transform: the indices of the layers to adapt")
        layers = self.layers_to_transform
        if layers is not None and not all(
            type(i) is int for i in (layers if isinstance(layers, list) else [layers])
        ):
            raise InputError(f"layers_to_transform must be an integer or a list of integers, not {layers!r}")

    def describe_cells(self, cells: list[nn.Cell]) -> None:
        """Set ``fan_in_fan_out`` to what the last linear cell's weight is, which is where PEFT leaves it."""
        linear = [cell for cell in cells if is_linear(cell)]
        if linear:
            transposed = is_transposed(linear[-1])
            if transposed != self.fan_in_fan_out:
                logger.warning("fan_in_fan_out is %s: the targeted cells' weights are so", transposed)
            self.fan_in_fan_out = transposed

    def layer_class(self, cell: nn.Cell, path: str) -> type[TunerLayer]:
        """The class that wraps a cell.

        Raises:
            InputError: LoRA can't wrap this kind of cell, or not with this config.
        """
        if is_linear(cell):
            if getattr(cell, "activation", None) is not None:
                raise InputError(
                    f"LoRA can't wrap {path!r}: its activation is fused into it; make that a cell of its own"
                )
            return LoraLinear
        if is_embedding(cell):
            if self.lora_bias:
                raise InputError(f"lora_bias is not possible for the embedding {path!r}")
            return LoraEmbedding
        raise refuse_cell(cell, path, "LoRA", "linear and embedding cells")


def _names(value: Any, key: str, allow_text: bool = True) -> Any:
    """A list of names as a set; text (a regular expression) and ``None`` as they are."""
    if value is None or (allow_text and isinstance(value, str)):
        return value
    if not isinstance(value, list | tuple | set) or not all(isinstance(name, str) for name in value):
        kinds = "a list of names or a regular expression" if allow_text else "a list of names"
        raise InputError(f"{key} must be {kinds}, not {value!r}")
    return set(value)


class LoraLayer(TunerLayer):
    """What LoRA's linear and embedding layers share: rank, scaling, and the names of A and B."""

    NAMES: ClassVar[tuple[str, str]]

    @classmethod
    def rank_of(cls, config: LoraConfig, path: str) -> int:
        """The rank for a cell: its pattern's, or ``r``."""
        return pattern_value(config.rank_pattern, path, config.r)

    @classmethod
    def scaling_of(cls, config: LoraConfig, path: str) -> float:
        rank = cls.rank_of(config, path)
        return pattern_value(config.alpha_pattern, path, config.lora_alpha) / (
            math.sqrt(rank) if config.use_rslora else rank
        )

    @classmethod
    def product(cls, tensors: Tensors, scaling: float) -> np.ndarray:
        """scaling * B @ A, (out, in), in float32."""
        a, b = (tensors[name].astype(np.float32) for name in cls.NAMES)
        return (b @ a) * np.float32(scaling)


class LoraLinear(LoraLayer):
    """LoRA on a linear cell: A (r, in), B (out, r), optionally B's bias (out)."""

    NAMES = ("lora_A.weight", "lora_B.weight")
    BIAS = "lora_B.bias"

    def __init__(self, base_layer: nn.Cell, path: str, shapes: Shapes, dtype: ms.dtype) -> None:
        self.biased = False
        super().__init__(base_layer, path, shapes, dtype)
        self.dropout = dropout(0.0)

    @classmethod
    def tensor_shapes(cls, cell: nn.Cell, config: LoraConfig, path: str) -> Shapes:
        rank, (n_in, n_out) = cls.rank_of(config, path), linear_features(cell)
        shapes = dict(zip(cls.NAMES, ((rank, n_in), (n_out, rank)), strict=True))
        return {**shapes, cls.BIAS: (n_out,)} if config.lora_bias else shapes

    @classmethod
    def initial_tensors(cls, cell: nn.Cell, config: LoraConfig, path: str) -> Tensors:
        shapes = cls.tensor_shapes(cell, config, path)
        (rank, n_in), kind = shapes[cls.NAMES[0]], config.init_lora_weights
        first = (
            np.random.normal(0, 1 / rank, (rank, n_in))
            if kind == "gaussian"
            else _uniform((rank, n_in), n_in)
        )
        # Not zero at the start: PEFT's init_lora_weights=False leaves torch's own initialisation in B.
        rest = {n: np.zeros(s) if kind else _uniform(s, rank) for n, s in shapes.items() if n != cls.NAMES[0]}
        return {name: value.astype(np.float32) for name, value in {cls.NAMES[0]: first, **rest}.items()}

    @classmethod
    def deltas(cls, cell: nn.Cell, tensors: Tensors, scaling: float) -> Tensors:
        product = cls.product(tensors, scaling)
        result = {"weight": product.T if is_transposed(cell) else product}
        if cls.BIAS in tensors:
            if getattr(cell, "bias", None) is None:
                raise InputError(
                    "an adapter with lora_bias can't be merged into a linear cell without a bias"
                )
            result["bias"] = tensors[cls.BIAS].astype(np.float32) * np.float32(scaling)
        return result

    def configure(self, config: LoraConfig) -> bool:
        changed = self.dropout.p != config.lora_dropout
        if changed:
            self.dropout = dropout(config.lora_dropout).set_train(self.training)
        return changed

    def reserve(self, shapes: Shapes) -> bool:
        changed = super().reserve(shapes)
        self.biased = self.BIAS in self.slot_shapes
        return changed

    def construct(self, x: ms.Tensor) -> ms.Tensor:
        result = self.base_layer(x)
        # The scaling goes where the numbers are fewest: on the r columns between A and B.
        hidden = linear(self.dropout(ops.cast(x, self.slot_dtype)), self.lora_A.weight) * self.scaling
        if self.biased:
            update = linear(hidden, self.lora_B.weight, self.lora_B.bias * self.scaling)
        else:
            update = linear(hidden, self.lora_B.weight)
        total = ops.cast(result, self.slot_dtype) + update
        return ops.cast(total, result.dtype)


class LoraEmbedding(LoraLayer):
    """LoRA on an embedding: A (r, vocabulary), B (dim, r); looks up A's columns, never the whole product."""

    NAMES = ("lora_embedding_A", "lora_embedding_B")

    def __init__(self, base_layer: nn.Cell, path: str, shapes: Shapes, dtype: ms.dtype) -> None:
        super().__init__(base_layer, path, shapes, dtype)
        padding = getattr(base_layer, "padding_idx", None)
        self.padding = -1 if padding is None else padding
        self.matmul = ops.MatMul(transpose_a=True, transpose_b=True)

    @classmethod
    def tensor_shapes(cls, cell: nn.Cell, config: LoraConfig, path: str) -> Shapes:
        rank, (vocabulary, dim) = cls.rank_of(config, path), getattr(cell, weight_attribute(cell)).shape
        return dict(zip(cls.NAMES, ((rank, vocabulary), (dim, rank)), strict=True))

    @classmethod
    def initial_tensors(cls, cell: nn.Cell, config: LoraConfig, path: str) -> Tensors:
        shapes = cls.tensor_shapes(cell, config, path)
        values = {name: np.random.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}
        if config.init_lora_weights:
            values[cls.NAMES[0]][:] = 0
        return values

    @classmethod
    def deltas(cls, cell: nn.Cell, tensors: Tensors, scaling: float) -> Tensors:
        return {weight_attribute(cell): cls.product(tensors, scaling).T}

    def construct(self, ids: ms.Tensor) -> ms.Tensor:
        result = self.base_layer(ids)
        flat = ops.reshape(ids, (-1,))
        columns = ops.gather(self.lora_embedding_A, flat, 1)  # (r, tokens)
        if self.padding >= 0:
            # As in torch, the padding token's column gets no gradient.
            columns = ops.select(ops.equal(flat, self.padding), ops.stop_gradient(columns), columns)
        update = ops.reshape(self.matmul(columns * self.scaling, self.lora_embedding_B), result.shape)
        total = ops.cast(result, self.slot_dtype) + update
        return ops.cast(total, result.dtype)


def _uniform(shape: tuple[int, ...], fan_in: int) -> np.ndarray:
    """Kaiming's uniform with a = sqrt(5), as torch's Linear has it: U(-1/sqrt(fan_in), 1/sqrt(fan_in))."""
    bound = 1 / math.sqrt(fan_in)
    return np.random.uniform(-bound, bound, shape)
