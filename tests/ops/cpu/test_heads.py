"""Splitting, turning and merging heads, against torch."""

from __future__ import annotations

import mindspore as ms
import numpy as np
import pytest
from mindspore import Tensor

from mindpeft.ops.cpu.heads import MergeHeadsKernel, SplitAndTurnKernel, SplitHeadsKernel
from tests.ops.cpu.cases import Random, some
from tests.ops.cpu.cells import assert_equals_torch
from tests.ops.cpu.expected import worst

TURNS = {"split_and_turn": False, "split_and_turn_neighbours": True}


@pytest.mark.parametrize("family", ["split_heads", "merge_heads"])
def test_copies_are_exact(kernels, family, seed):
    assert worst(kernels, some(family, 60, seed)) == 0


@pytest.mark.parametrize("family", TURNS)
def test_equals_torch(kernels, family, seed):
    assert worst(kernels, some(family, 60, seed)) < 1e-6


@pytest.mark.parametrize("empty", [False, True])
def test_cells(empty):
    of_rank = {family: pick(family, empty) for family in ("split_heads", "merge_heads", *TURNS)}
    split, merge = of_rank["split_heads"], of_rank["merge_heads"]
    assert_equals_torch(SplitHeadsKernel(int(split.fixed[0])), split)
    assert_equals_torch(MergeHeadsKernel(merge.inputs[0].shape[1]), merge)
    for family, interleaved in TURNS.items():
        cos, sin, heads = of_rank[family].fixed
        cell = SplitAndTurnKernel(int(heads), interleaved)

        def turn(x, cell=cell, cos=cos, sin=sin):
            return cell(x, Tensor(cos), Tensor(sin))

        assert_equals_torch(turn, of_rank[family])


def pick(family: str, empty: bool):
    """A case of some rows, or of none."""
    return next(
        case
        for case in some(family, 60)
        if (case.inputs[0].size == 0) == empty and case.inputs[0].size < 5000
    )


def test_each_number_of_heads_has_a_gradient_of_its_own_in_one_graph(graph_mode):
    """MindSpore gives operators that it takes for one the first one's gradient."""
    cells = [MergeHeadsKernel(2), MergeHeadsKernel(3)]

    def both(x):
        return cells[0](x.reshape((1, 2, 6, 2))).sum() + (cells[1](x.reshape((1, 3, 4, 2))) ** 2).sum()

    x = Random(0).normal(24)
    found = ms.jit(ms.grad(both))(Tensor(x)).asnumpy()
    np.testing.assert_allclose(found, 1 + 2 * x, rtol=1e-5)
