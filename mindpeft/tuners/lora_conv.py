"""LoRA on convolutions: A has the kernel, stride and padding of the cell, B is a single point."""

from __future__ import annotations

from typing import Any

import mindspore as ms
import numpy as np
from mindspore import nn, ops

from mindpeft.errors import InputError
from mindpeft.tuners.base import Shapes, Site, Tensors, kaiming_uniform, original
from mindpeft.tuners.lora_layers import LoraLinear

_INITIALISATIONS = (True, False, "gaussian")


def is_convolution(cell: nn.Cell) -> bool:
    """Whether a cell is an `nn.Conv2d` or `nn.Conv1d` of MindSpore."""
    return isinstance(cell, nn.Conv2d | nn.Conv1d)


class LoraConv2d(LoraLinear):
    """LoRA on `nn.Conv2d`: A (r, in, height, width), B (out, r / groups, 1, 1), optionally B's bias (out).

    As in PEFT, A has no groups; so with groups B A is no convolution of the cell's kind and can't be merged.
    """

    def __init__(self, base_layer: nn.Cell, *slot: Any) -> None:
        super().__init__(base_layer, *slot)
        self.bias_add = ops.BiasAdd()
        self._make_operators()

    @classmethod
    def check(cls, config: Any, cell: nn.Cell, path: str) -> None:
        """Raise ``InputError`` for a convolution, or a config, that PEFT has no LoRA for."""
        if config.use_dora:
            raise InputError(f"use_dora is not supported for the convolution {path!r}")
        if config.init_lora_weights not in _INITIALISATIONS:
            kind = repr(config.init_lora_weights)
            raise InputError(
                f"init_lora_weights={kind} is not possible for the convolution {path!r}; "
                'allowed: true, false, "gaussian"'
            )
        dilated = (d > 1 and k > 1 for d, k in zip(cell.dilation, cell.kernel_size, strict=True))
        if any(dilated):
            raise InputError(
                f"LoRA can't wrap {path!r}: PEFT's has no dilation, but the cell has {cell.dilation}"
            )

    @classmethod
    def tensor_shapes(cls, site: Site) -> Shapes:
        cell, rank = site.cell, cls.rank_of(site)
        if rank % cell.group:
            raise InputError(f"the rank {rank} of {site.path!r} must be divisible by its {cell.group} groups")
        kernel = cls.kernel(cell)
        first, second = (rank, cell.in_channels, *kernel), (cell.out_channels, rank // cell.group)
        shapes = dict(zip(cls.NAMES, (first, (*second, *(1 for _ in kernel))), strict=True))
        return {**shapes, cls.BIAS: (cell.out_channels,)} if site.config.lora_bias else shapes

    @staticmethod
    def kernel(cell: nn.Cell) -> tuple[int, ...]:
        """The kernel's sides, as torch counts them."""
        return tuple(cell.kernel_size)

    @classmethod
    def initial_tensors(cls, site: Site) -> Tensors:
        kind, shapes = site.config.init_lora_weights, cls.tensor_shapes(site)
        first, second = (shapes[name] for name in cls.NAMES)
        a = np.random.normal(0, 1 / first[0], first) if kind == "gaussian" else kaiming_uniform(first)
        values = dict(zip(cls.NAMES, (a, np.zeros(second) if kind else kaiming_uniform(second)), strict=True))
        if site.config.lora_bias:
            values[cls.BIAS] = np.zeros(second[0]) if kind else kaiming_uniform(second)[:, 0].reshape(-1)
        return {name: value.astype(np.float32) for name, value in values.items()}

    @classmethod
    def takes_out(cls, site: Site) -> bool:
        return False

    @classmethod
    def product(cls, site: Site, tensors: Tensors) -> np.ndarray:
        """s B A in the shape of the cell's weight, in float32."""
        a, b = (tensors[name].astype(np.float32).reshape(tensors[name].shape[0], -1) for name in cls.NAMES)
        return ((b @ a) * np.float32(cls.scaling_of(site))).reshape(site.cell.weight.shape)

    @classmethod
    def check_merge(cls, site: Site) -> None:
        super().check_merge(site)
        if site.cell.group > 1:
            raise InputError(
                f"an adapter of the convolution {site.path!r} with {site.cell.group} groups can't be merged"
            )

    @classmethod
    def holds(cls, room: Shapes, shapes: Shapes) -> bool:
        # The groups of B share the rank out among them: zeros after the last would move the others.
        first, second = (shapes[name] for name in cls.NAMES)
        return first[0] == second[1] or all(room.get(name) == shape for name, shape in shapes.items())

    def reserve(self, shapes: Shapes) -> bool:
        changed = super().reserve(shapes)
        if changed and "base_layer" in self.name_cells():
            self._make_operators()
        return changed

    def _make_operators(self) -> None:
        cell = original(self.base_layer)
        rank, out = (self.slot_shapes[name][0] for name in self.NAMES)
        like_the_cell = {"pad_mode": cell.pad_mode, "pad": cell.padding, "stride": cell.stride}
        self.first = ops.Conv2D(rank, cell.kernel_size, **like_the_cell)
        self.second = ops.Conv2D(out, (1, 1), group=cell.group)

    def update(self, x: ms.Tensor) -> ms.Tensor:
        return self.convolve(x, self.lora_A.weight, self.lora_B.weight)

    def convolve(self, x: ms.Tensor, a: ms.Tensor, b: ms.Tensor) -> ms.Tensor:
        """s B A x for x (batch, in, height, width), A and B with two sides; runs inside a graph."""
        result = self.second(self.first(x, a) * self.scaling, b)
        if self.biased:
            result = self.bias_add(result, self.lora_B.bias * self.scaling)
        return result


class LoraConv1d(LoraConv2d):
    """LoRA on `nn.Conv1d`, a two-dimensional one of height 1: A (r, in, width), B (out, r / groups, 1)."""

    @staticmethod
    def kernel(cell: nn.Cell) -> tuple[int, ...]:
        return tuple(cell.kernel_size[1:])

    def update(self, x: ms.Tensor) -> ms.Tensor:
        a, b = ops.expand_dims(self.lora_A.weight, 2), ops.expand_dims(self.lora_B.weight, 2)
        return ops.squeeze(self.convolve(ops.expand_dims(x, 2), a, b), 2)
