"""VeRA: fixed random matrices that all layers share, and two trained vectors in each layer.

Kopiczko et al. 2023, "VeRA: Vector-based Random Matrix Adaptation": y = W x + b * (B (d * (A x))), where a
layer takes the first columns of A and the first rows of B.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import mindspore as ms
import numpy as np
from mindspore import nn, ops

from mindpeft.config import PeftType, register_method
from mindpeft.errors import InputError
from mindpeft.ops.dropout import dropout
from mindpeft.targets import LORA_TARGETS
from mindpeft.tuners.base import (
    Shapes,
    SharedSlot,
    Site,
    Slot,
    Tensors,
    TunerLayer,
    check_linear,
    is_transposed,
    linear_features,
)
from mindpeft.tuners.delta import ThinLayer
from mindpeft.tuners.plan import BaseModel
from mindpeft.tuners.targeted import TargetedConfig, check_count, check_number, check_rate


@register_method
@dataclass
class VeraConfig(TargetedConfig):
    """Hugging Face PEFT's configuration of VeRA, key by key.

    Attributes:
        r: the rank; larger than LoRA's, since only vectors are trained.
        target_modules: names or dotted suffixes of linear cells, or a regular expression for the full path,
            or "all-linear"; ``None`` takes the model type's default.
        projection_prng_key: the seed of the random matrices of a fresh adapter.
        save_projection: must be true: the random matrices are in the file.
        vera_dropout: dropout on the input of A while training.
        d_initial: what the vector d starts with.
        fan_in_fan_out: the weights are (in, out); set from the cells themselves.
        bias: which of the base model's biases are trained: "none", "all", "vera_only".
        modules_to_save: cells trained and saved whole (a fresh head).
        init_weights: start with b zero, so that nothing changes; else b is one and d normal.
        layers_to_transform: only these layer indices; needs a list of targets.
        layers_pattern: the name before the layer index.

    Raises:
        InputError: a value is not allowed, or keys contradict each other.
    """

    r: int = 256
    projection_prng_key: int = 0
    save_projection: bool = True
    vera_dropout: float = 0.0
    d_initial: float = 0.1
    fan_in_fan_out: bool = False
    bias: str = "none"
    init_weights: bool = True
    layers_to_transform: list[int] | int | None = None
    layers_pattern: list[str] | str | None = None

    METHOD: ClassVar[PeftType] = PeftType.VERA
    SHARED_PREFIX: ClassVar[str] = "base_model."
    DEFAULT_TARGETS: ClassVar = {**LORA_TARGETS, "phi": ["q_proj", "v_proj"]}
    BIAS_ONLY = "vera_only"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count("r", self.r)
        check_count("projection_prng_key", self.projection_prng_key, least=0)
        check_number("d_initial", self.d_initial)
        check_rate("vera_dropout", self.vera_dropout)
        if not self.save_projection:
            raise InputError(
                "save_projection=False is not supported: without vera_A and vera_B in the file they would "
                "have to come from torch's random generator; save the adapter with save_projection=True"
            )

    def roomy(self, slot_rank: int) -> VeraConfig:
        return replace(self, r=slot_rank)

    def slot_class(self, cell: nn.Cell, path: str) -> type[TunerLayer]:
        check_linear(cell, path, "VeRA")
        return VeraLinear

    def slot_classes(self, base: BaseModel) -> dict[str, type[Slot]]:
        return {"": VeraProjections, **super().slot_classes(base)}


class VeraProjections(SharedSlot):
    """A (r, widest in) and B (widest out, r), never trained."""

    BUFFERS = frozenset({"vera_A", "vera_B"})

    @classmethod
    def tensor_shapes(cls, site: Site) -> Shapes:
        widest_in, widest_out = np.max([linear_features(cell) for cell in site.targets.values()], axis=0)
        return {"vera_A": (site.config.r, int(widest_in)), "vera_B": (int(widest_out), site.config.r)}

    @classmethod
    def initial_tensors(cls, site: Site) -> Tensors:
        # He's uniform initialisation. One key gives one pair of matrices, whatever was drawn before.
        generator = np.random.default_rng(site.config.projection_prng_key)
        return {
            name: generator.uniform(-math.sqrt(6 / shape[1]), math.sqrt(6 / shape[1]), shape).astype(
                np.float32
            )
            for name, shape in cls.tensor_shapes(site).items()
        }


class VeraLinear(ThinLayer):
    """The vectors d (r) and b (out) of a linear cell."""

    def __init__(self, base_layer: nn.Cell, *slot: Any) -> None:
        super().__init__(base_layer, *slot)
        self.dropout = dropout(0.0)
        self.matmul = ops.MatMul()

    @classmethod
    def tensor_shapes(cls, site: Site) -> Shapes:
        return {"vera_lambda_b": (linear_features(site.cell)[1],), "vera_lambda_d": (site.config.r,)}

    @classmethod
    def initial_tensors(cls, site: Site) -> Tensors:
        shapes = cls.tensor_shapes(site)
        if site.config.init_weights:
            d = np.full(shapes["vera_lambda_d"], site.config.d_initial)
            b = np.zeros(shapes["vera_lambda_b"])
        else:
            d = np.random.standard_normal(shapes["vera_lambda_d"])
            b = np.ones(shapes["vera_lambda_b"])
        return {"vera_lambda_b": b.astype(np.float32), "vera_lambda_d": d.astype(np.float32)}

    @classmethod
    def merged(cls, site: Site, weights: Tensors, tensors: Tensors, shared: Tensors | None = None) -> Tensors:
        n_in, n_out = linear_features(site.cell)
        b, d = tensors["vera_lambda_b"][:, None], tensors["vera_lambda_d"][:, None]
        delta = (b * shared["vera_B"][:n_out]) @ (d * shared["vera_A"][:, :n_in])
        return {"weight": weights["weight"] + (delta.T if is_transposed(site.cell) else delta)}

    def configure(self, config: VeraConfig, trainable: bool) -> bool:
        changed = trainable and self.dropout.p != config.vera_dropout
        if changed:
            self.dropout = dropout(config.vera_dropout).set_train(self.training)
        return changed

    def construct(self, x: ms.Tensor) -> ms.Tensor:
        n_out = self.vera_lambda_b.shape[0]
        first = ops.cast(self.shared.vera_A, self.slot_dtype)[:, : x.shape[-1]]
        second = ops.cast(self.shared.vera_B, self.slot_dtype)[:n_out]
        d, b = self.vera_lambda_d * self.scaling, self.vera_lambda_b
        drops = self.training and self.dropout.p > 0
        if not drops and self.pays(x, first.shape[0], n_out):
            rows = self.matmul(self.scale_columns(second, d), first)
            return self.with_delta(x, rows * ops.tile(b.reshape((n_out, 1)), (1, x.shape[-1])))
        hidden = self.linear(self.dropout(ops.cast(x, self.slot_dtype)), first)
        return self.beside(x, self.scale_columns(self.linear(self.scale_columns(hidden, d), second), b))
