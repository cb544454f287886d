"""How AdaLoRA prunes ranks, inside the compiled step: the least important triplets over all layers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import mindspore as ms
import numpy as np
from mindspore import Parameter, Tensor, ops

from mindpeft.ops.cpu import kernels_on
from mindpeft.ops.cpu.adalora import PenaltyKernel, PruneKernel
from mindpeft.tuners.hooks import TrainingHook

if TYPE_CHECKING:
    from mindpeft.tuners.adalora import AdaLoraConfig, AdaLoraLinear


class RankAllocation(TrainingHook):
    """The orthogonality term, and the pruning after each update.

    Args:
        config: gets ``rank_pattern`` when the adapter is read.
        layers: by path.
        ranks: their true ranks; a slot may be larger.
    """

    def __init__(
        self, config: AdaLoraConfig, layers: Mapping[str, AdaLoraLinear], ranks: Mapping[str, int]
    ) -> None:
        names = ("lora_A", "lora_E", "lora_B")
        super().__init__(layer.slot(name) for layer in layers.values() for name in names)
        self.config = config
        self.paths, self.ranks = tuple(layers), tuple(ranks.values())
        # A pattern stands if its ranks were cut away; that of an earlier run over all ranks is out of date.
        cut = any(len(config.left(path) or ()) != rank for path, rank in ranks.items())
        self.earlier = config.rank_pattern if cut else None
        total, count = sum(self.ranks), len(self.ranks)
        self.weight = config.orth_reg_weight / (2 * count)
        self.beta1, self.beta2 = config.beta1, config.beta2
        self.last = config.total_step - config.tfinal
        self.pruned = _constant(np.array(config.budgets(total, count), np.int32), "adalora.pruned")
        self.parameters = ms.ParameterTuple(self.watched)
        self.shapes = tuple(
            shape
            for layer, rank in zip(layers.values(), self.ranks, strict=True)
            for shape in ((rank, layer.lora_A.shape[1]), (rank, 1), (layer.lora_B.shape[0], rank))
        )
        self.sizes = tuple(int(np.prod(shape)) for shape in self.shapes)
        zeros = np.zeros(sum(self.sizes), np.float32)
        self.exp_avg_ipt = _constant(zeros, "adalora.exp_avg_ipt")
        self.exp_avg_unc = _constant(zeros, "adalora.exp_avg_unc")
        self.kept = _constant(np.full(total, -1, np.float32), "adalora.kept")  # -1: nothing was pruned yet
        self.whole = tuple(
            tuple(p.shape) == shape for p, shape in zip(self.watched, self.shapes, strict=True)
        )
        self.groups = self.alike()
        self.of_rows = tuple(places[0] % 3 == 0 for places in self.groups)
        self.identities = tuple(
            Tensor(np.tile(np.eye(self.ranks[places[0] // 3]), (len(places), 1, 1)), ms.float32)
            for places in self.groups
        )
        self.factors = ms.ParameterTuple(p for i, p in enumerate(self.watched) if i % 3 != 1)
        self.penalty_kernel = self.prune_kernel = None
        if kernels_on() and all(parameter.dtype == ms.float32 for parameter in self.watched):
            self.penalty_kernel = PenaltyKernel(self.weight, self.ranks)
            self.prune_kernel = PruneKernel((self.beta1, self.beta2), self.ranks)
        self.rows, self.columns = ops.BatchMatMul(transpose_b=True), ops.BatchMatMul(transpose_a=True)

    def alike(self) -> tuple[tuple[int, ...], ...]:
        """The places of the As and of the Bs that aren't empty, those of one shape together.

        A graph is a fraction of the size if it measures them together.
        """
        groups: dict[tuple[bool, tuple[int, ...]], list[int]] = {}
        for place, shape in enumerate(self.shapes):
            if place % 3 != 1 and self.ranks[place // 3] > 0:
                groups.setdefault((place % 3 == 0, shape), []).append(place)
        return tuple(map(tuple, groups.values()))

    def state(self) -> dict[str, Parameter]:
        return {"exp_avg_ipt": self.exp_avg_ipt, "exp_avg_unc": self.exp_avg_unc, "kept": self.kept}

    def write_back(self) -> None:
        kept = self.kept.asnumpy()
        self.config.rank_pattern = self.earlier
        if (kept >= 0).all():
            pieces = np.split(kept > 0, np.cumsum(self.ranks)[:-1])
            self.config.rank_pattern = {
                f"{path}.lora_E": piece.tolist() for path, piece in zip(self.paths, pieces, strict=True)
            }

    def true(self, tensor: Tensor, index: int) -> Tensor:
        """A slot's tensor in its adapter's true shape; runs inside a graph."""
        if self.whole[index]:
            return tensor
        rows, columns = self.shapes[index]
        return tensor[:rows, :columns]

    def penalty(self) -> Tensor:
        if self.penalty_kernel is not None:
            return self.penalty_kernel(self.factors).reshape(())
        total = Tensor(0.0, ms.float32)
        for i in range(len(self.groups)):
            total = total + self.distances(i)
        return total * self.weight

    def distances(self, group: int) -> Tensor:
        """How far A A^T, or B^T B, is from the identity in Frobenius' norm, summed over a group."""
        matrices = ()
        for place in self.groups[group]:
            matrices = (*matrices, self.true(self.parameters[place], place).astype(ms.float32))
        stacked = ops.stack(matrices)
        square = self.rows(stacked, stacked) if self.of_rows[group] else self.columns(stacked, stacked)
        difference = square - self.identities[group]
        return ops.sqrt((difference * difference).sum((1, 2))).sum()

    def joins_kernel(self) -> bool:
        return self.prune_kernel is not None

    def after_kernel(
        self, gradients: tuple[Tensor, ...], update: tuple[Tensor, Tensor], step: Tensor
    ) -> Tensor:
        state = (self.exp_avg_ipt, self.exp_avg_unc, self.kept)
        return self.prune_kernel(gradients, self.parameters, state, (self.pruned, step), update)

    def after_update(self, values: tuple[Tensor, ...], gradients: tuple[Tensor, ...], step: Tensor) -> None:
        element_scores = self.smooth(values, gradients, step < self.last)
        number = ops.gather(self.pruned, ops.minimum(step, self.last), 0)
        due = number >= 0
        first_time = ops.logical_or(step <= self.last, self.kept[0] < 0)
        kept = ops.select(ops.logical_and(due, first_time), self.choice(element_scores, number), self.kept)
        ops.assign(self.kept, kept)
        self.mask(values, ops.select(due, kept, ops.ones_like(kept)))

    def smooth(self, values: tuple[Tensor, ...], gradients: tuple[Tensor, ...], counts: Tensor) -> Tensor:
        """Take a gradient into the importance, |value * gradient|, and its uncertainty, if it counts.

        Returns:
            the product of both, flat.
        """
        pieces = ()
        for i in range(len(gradients)):
            product = self.true(values[i], i).astype(ms.float32) * self.true(gradients[i], i)
            pieces = (*pieces, ops.reshape(ops.abs(product), (-1,)))
        importance = ops.cat(pieces)
        earlier, earlier_spread = self.exp_avg_ipt.value(), self.exp_avg_unc.value()
        average = earlier * self.beta1 + importance * (1.0 - self.beta1)
        spread = ops.abs(importance - average)
        uncertainty = earlier_spread * self.beta2 + spread * (1.0 - self.beta2)
        average = ops.select(counts, average, earlier)
        uncertainty = ops.select(counts, uncertainty, earlier_spread)
        ops.assign(self.exp_avg_ipt, average)
        ops.assign(self.exp_avg_unc, uncertainty)
        return average * uncertainty

    def choice(self, element_scores: Tensor, number: Tensor) -> Tensor:
        """1 for each triplet but the ``number`` least important ones, (triplets,)."""
        pieces = ops.split(element_scores, self.sizes)
        scores = ()
        for i in range(len(self.ranks)):
            a = ops.reshape(pieces[3 * i], self.shapes[3 * i]).mean(1)
            b = ops.reshape(pieces[3 * i + 2], self.shapes[3 * i + 2]).mean(0)
            scores = (*scores, pieces[3 * i + 1] + (a + b))
        scores = ops.cat(scores)
        ordered, _ = ops.sort(scores)
        threshold = ops.gather(ordered, ops.maximum(number - 1, 0), 0)
        more = ops.logical_or(ops.greater(scores, threshold), ops.less_equal(number, 0))
        return more.astype(ms.float32)

    def mask(self, values: tuple[Tensor, ...], factors: Tensor) -> None:
        """Multiply the triplets' values by 0 or 1."""
        start = 0
        for i in range(len(self.ranks)):
            kept = factors[start : start + self.ranks[i]]
            room = values[3 * i + 1].shape[0] - self.ranks[i]
            if room > 0:
                kept = ops.cat((kept, ops.zeros((room,), ms.float32)))
            kept = ops.reshape(kept, (-1, 1)).astype(values[3 * i + 1].dtype)
            ops.assign(self.parameters[3 * i + 1], values[3 * i + 1] * kept)
            start += self.ranks[i]


def _constant(value: np.ndarray, name: str) -> Parameter:
    return Parameter(Tensor(value), name=name, requires_grad=False)
