"""Compacter: bottleneck adapters whose projections are sums of Kronecker products.

Mahabadi et al. 2021, "Compacter: Efficient Low-Rank Hypercomplex Adapter Layers", after Zhang et al. 2021,
"Beyond Fully-Connected Layers with Quaternions": H = sum_i kron(rule_i, W_i), y = x H + b. The rules, and the
W_i too if wanted, are shared by all layers of an adapter; W_i = left_i right_i where they are factorised.
"""

from __future__ import annotations

import math
from collections.abc import Collection
from typing import Any

import mindspore as ms
import numpy as np
from mindspore import nn, ops

from mindpeft.errors import InputError
from mindpeft.ops.linear import linear
from mindpeft.tuners.base import Shapes, SharedSlot, Site, Tensors
from mindpeft.tuners.bottleneck_layers import DOWN, UP, BottleneckLayer
from mindpeft.tuners.half_layers import hidden_size

RULE = "phm_rule"


def rule_shapes(config: Any) -> Shapes:
    """The tensors of the rules, (dim, dim, dim) or two factors of rank 1 whose product that is."""
    dim = config.phm_dim
    if config.factorized_phm_rule:
        return {f"{RULE}_left": (dim, dim, 1), f"{RULE}_right": (dim, 1, dim)}
    return {RULE: (dim, dim, dim)}


def matrix_shapes(config: Any, n_in: int, n_out: int, name: str = "W") -> Shapes:
    """The tensors of the matrices W_i, (dim, n_in/dim, n_out/dim) or two factors of rank ``phm_rank``."""
    dim, rank = config.phm_dim, config.phm_rank
    if config.factorized_phm_W:
        return {f"{name}_left": (dim, n_in // dim, rank), f"{name}_right": (dim, rank, n_out // dim)}
    return {name: (dim, n_in // dim, n_out // dim)}


def glorot_normal(random: Any, shape: tuple[int, ...]) -> np.ndarray:
    """Glorot's normal distribution for each matrix of a stack.

    The library draws from it whatever ``hypercomplex_nonlinearity`` says.
    """
    return random.normal(0.0, math.sqrt(2 / (shape[1] + shape[2])), shape)


def initial_rule(random: Any, shape: tuple[int, ...], config: Any, shared: bool) -> np.ndarray:
    """A fresh rule; the library spreads shared ones and a layer's own differently."""
    if config.phm_c_init == "uniform":
        bound = 1.0 if shared else 0.01
        return random.uniform(-bound, bound, shape)
    return random.normal(0.0, config.phm_init_range if shared else 0.01, shape)


def weight_of(rule: ms.Tensor, matrix: ms.Tensor) -> ms.Tensor:
    """The transpose of sum_i kron(rule_i, matrix_i).

    Args:
        rule: (dim, dim, dim).
        matrix: (dim, rows, columns).

    Returns:
        Tensor of shape (dim * columns, dim * rows): (out, in).
    """
    dim, rows, columns = matrix.shape
    products = ops.MatMul(transpose_a=True)(
        rule.reshape((dim, dim * dim)), matrix.reshape((dim, rows * columns))
    )
    blocks = products.reshape((dim, dim, rows, columns)).transpose((1, 3, 0, 2))
    return blocks.reshape((dim * columns, dim * rows))


class SharedPhm(SharedSlot):
    """The rules, and the matrices if wanted, that all layers of an adapter share."""

    @classmethod
    def tensor_shapes(cls, site: Site) -> Shapes:
        config, place = site.config, next(iter(site.targets))
        shapes = rule_shapes(config) if config.shared_phm_rule else {}
        if config.shared_W_phm:
            hidden = hidden_size(site.targets[place])
            width = CompacterLayer.width(Site(site.targets[place], place, config, site.targets))
            shapes |= matrix_shapes(config, hidden, width, "W_down") | matrix_shapes(
                config, width, hidden, "W_up"
            )
        return shapes

    @classmethod
    def initial_tensors(cls, site: Site) -> Tensors:
        values = {
            name: initial_rule(np.random, shape, site.config, shared=True)
            if name.startswith(RULE)
            else glorot_normal(np.random, shape)
            for name, shape in cls.tensor_shapes(site).items()
        }
        return {name: value.astype(np.float32) for name, value in values.items()}

    @classmethod
    def trained(cls, site: Site, names: Collection[str]) -> frozenset[str]:
        return without_rules(site, names)

    @classmethod
    def holds(cls, room: Shapes, shapes: Shapes) -> bool:
        return room == shapes


def without_rules(site: Site, names: Collection[str]) -> frozenset[str]:
    """The tensors that are trained: the rules are only with ``learn_phm``."""
    return frozenset(name for name in names if site.config.learn_phm or RULE not in name)


class CompacterLayer(BottleneckLayer):
    """A bottleneck adapter whose projections are sums of Kronecker products."""

    @classmethod
    def width(cls, site: Site) -> int:
        width, hidden, dim = super().width(site), hidden_size(site.cell), site.config.phm_dim
        if width % dim or hidden % dim:
            raise InputError(
                f"phm_dim {dim} must divide both the hidden size {hidden} and the bottleneck's width {width} "
                f"at {site.path!r}; choose another phm_dim or reduction_factor"
            )
        return width

    @classmethod
    def projection_shapes(cls, config: Any, n_in: int, n_out: int) -> Shapes:
        shapes = {} if config.shared_W_phm else matrix_shapes(config, n_in, n_out)
        shapes |= {} if config.shared_phm_rule else rule_shapes(config)
        return {**shapes, "b": (n_out,)} if config.phm_bias else shapes

    @classmethod
    def initial(cls, site: Site, name: str, shape: tuple[int, ...], random: Any) -> np.ndarray:
        module, _, leaf = name.rpartition(".")
        if module in (DOWN, UP) and leaf.startswith(RULE):
            return initial_rule(random, shape, site.config, shared=False)
        if module in (DOWN, UP) and leaf.startswith("W"):
            return glorot_normal(random, shape)
        return super().initial(site, name, shape, random)

    @classmethod
    def trained(cls, site: Site, names: Collection[str]) -> frozenset[str]:
        return without_rules(site, names)

    def down(self, x: ms.Tensor) -> ms.Tensor:
        bias = self.adapter_down.b if self.phm_bias else None
        return linear(x, weight_of(self.rule(self.adapter_down), self.down_matrix()), bias)

    def up(self, inner: ms.Tensor) -> ms.Tensor:
        bias = self.adapter_up.b if self.phm_bias else None
        return self.scaled(inner, weight_of(self.rule(self.adapter_up), self.up_matrix()), bias)

    def rule(self, own: nn.Cell) -> ms.Tensor:
        """The rules, shared or those of one projection."""
        holder = self.shared if self.shared_phm_rule else own
        if self.factorized_phm_rule:
            return ops.bmm(holder.phm_rule_left, holder.phm_rule_right)
        return holder.phm_rule

    def down_matrix(self) -> ms.Tensor:
        """The matrices of the projection to the bottleneck."""
        if self.shared_W_phm:
            return ops.bmm(self.shared.W_down_left, self.shared.W_down_right)
        return own_matrix(self.adapter_down, self.factorized_phm_W)

    def up_matrix(self) -> ms.Tensor:
        """The matrices of the projection back."""
        if self.shared_W_phm:
            return ops.bmm(self.shared.W_up_left, self.shared.W_up_right)
        return own_matrix(self.adapter_up, self.factorized_phm_W)


def own_matrix(projection: nn.Cell, factorised: bool) -> ms.Tensor:
    """The matrices of one projection."""
    if factorised:
        return ops.bmm(projection.W_left, projection.W_right)
    return projection.W
