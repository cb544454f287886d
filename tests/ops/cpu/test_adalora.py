"""AdaLoRA's kernels against torch and against MindSpore's operators."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tests.ops.cotangent import cotangent
from tests.ops.cpu.cases import some


@pytest.mark.parametrize("case", some("adalora_penalty", 6), ids=str)
def test_penalty_equals_torchs(kernels, case):
    *factors, settings = case.inputs
    given = [torch.tensor(factor, dtype=torch.float64, requires_grad=True) for factor in factors]
    total = 0
    for i, factor in enumerate(given):
        rank = int(settings[1 + i // 2])
        rows = factor[:rank] if i % 2 == 0 else factor[:, :rank].T
        total = total + settings[0] * torch.linalg.norm(rows @ rows.T - torch.eye(rank))
    total.backward()
    value, *gradients = case.run(kernels)
    np.testing.assert_allclose(value, [total.item()], rtol=1e-5)
    for mine, other in zip(gradients, given, strict=True):
        expected = other.grad.numpy() * cotangent((1,))
        np.testing.assert_allclose(mine, expected, rtol=1e-4, atol=1e-5)


def test_orthogonal_matrices_have_a_gradient_of_zero(kernels):
    settings = np.array([0.5, 2], np.float32)
    case = [np.eye(2, 5, dtype=np.float32), np.eye(7, 2, dtype=np.float32), settings, cotangent((1,))]
    for gradient in kernels.compute("adalora_penalty_grad", *case, to=[(2, 5), (7, 2)]):
        np.testing.assert_array_equal(gradient, 0)


def pruned(case) -> list[np.ndarray]:
    """What the kernel changes, by NumPy."""
    tensors, (betas, ranks) = case.inputs, np.split(case.inputs[-1], [2])
    count = (len(tensors) - 8) // 2
    gradients, parameters = (list(tensors[k * count : (k + 1) * count]) for k in range(2))
    importance, spread, kept, budget, step, _, factor = tensors[2 * count : -1]
    uses = [slot for rank in ranks.astype(int) for slot in (np.s_[:rank], np.s_[:rank], np.s_[:, :rank])]
    products = [
        np.abs(p[use] * g[use] * factor) for p, g, use in zip(parameters, gradients, uses, strict=True)
    ]
    if step < len(budget) - 1:
        now = np.concatenate([product.reshape(-1) for product in products])
        importance = importance * betas[0] + now * (1 - betas[0])
        spread = spread * betas[1] + np.abs(now - importance) * (1 - betas[1])
    edges = np.cumsum([product.size for product in products])[:-1]
    pieces = [
        piece.reshape(product.shape)
        for piece, product in zip(np.split(importance * spread, edges), products, strict=True)
    ]
    triples = zip(pieces[::3], pieces[1::3], pieces[2::3], strict=True)
    scores = np.concatenate([a.mean(1) + e[:, 0] + b.mean(0) for a, e, b in triples])
    number = budget[min(int(step), len(budget) - 1)]
    if number >= 0:
        kept = (np.argsort(np.argsort(scores)) >= number).astype(np.float32)
        for i, mine in enumerate(np.split(kept, np.cumsum(ranks.astype(int))[:-1])):
            parameters[3 * i + 1] = parameters[3 * i + 1].copy()
            parameters[3 * i + 1][: mine.size, 0] *= mine
    return [*parameters, importance, spread, kept]


@pytest.mark.parametrize("case", some("adalora_prune", 12), ids=str)
def test_pruning_equals_numpys(kernels, case):
    for mine, other in zip(case.run(kernels), pruned(case), strict=True):
        np.testing.assert_allclose(mine, other, rtol=1e-5, atol=1e-7)


def test_what_was_kept_stays_after_the_last_pruning_and_without_an_update_nothing_changes(kernels):
    case = next(case for case in some("adalora_prune", 40) if case.inputs[-4] == 7)
    tensors = list(case.inputs)
    count = (len(tensors) - 8) // 2
    kept = tensors[2 * count + 2]
    kept[:] = np.arange(kept.size) % 2
    found = case.run(kernels)
    np.testing.assert_array_equal(found[-1], kept)
    rank = int(tensors[-1][2])
    np.testing.assert_array_equal(found[1][:rank, 0], tensors[count + 1][:rank, 0] * kept[:rank])
    tensors[-3] = np.array([np.nan], np.float32)
    found = case._replace(inputs=tuple(tensors)).run(kernels)
    for mine, before in zip(found, tensors[count : 2 * count + 3], strict=True):
        np.testing.assert_array_equal(mine, before)
