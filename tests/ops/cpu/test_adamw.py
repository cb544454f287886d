"""Clipping and AdamW in one kernel, against torch."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tests.ops.cpu.cases import Random, numbers

SHAPES = [(3,), (130, 257), (1,), (5, 7, 11)]  # the second is more than one piece of work
LOSS = np.array(0, np.float32)
BETAS, EPS, RATE = (0.9, 0.98), 1e-7, 3e-3
DECAYS, RATES = (0.0, 0.1, 0.0, 0.02), (1.0, 1.0, 4.0, 0.5)


def scalars(step: int) -> list[np.ndarray]:
    values = (RATE, RATE / (1 - BETAS[0] ** step), (1 - BETAS[1] ** step) ** -0.5)
    return [np.array(value, np.float32) for value in values]


def torch_optimizer(parameters: list[torch.Tensor]) -> torch.optim.Optimizer:
    groups = [
        {"params": [parameter], "weight_decay": decay, "lr": RATE * rate}
        for parameter, decay, rate in zip(parameters, DECAYS, RATES, strict=True)
    ]
    return torch.optim.AdamW(groups, betas=BETAS, eps=EPS)


@pytest.mark.parametrize("most", [0.0, 1.0, 1e6])
def test_five_steps_equal_torchs(kernels, most):
    random = Random(0)
    ours = [random.normal(*shape) for shape in SHAPES]
    theirs = [torch.tensor(value, dtype=torch.float64, requires_grad=True) for value in ours]
    optimizer = torch_optimizer(theirs)
    moments = [np.zeros(sum(value.size for value in ours), np.float32) for _ in range(2)]
    settings = numbers(*BETAS, EPS, most, *DECAYS, *RATES)
    norm, factor = np.zeros(1, np.float32), np.zeros(1, np.float32)
    for step in range(1, 6):
        gradients = [random.normal(*shape, scale=step) for shape in SHAPES]
        for parameter, gradient in zip(theirs, gradients, strict=True):
            parameter.grad = torch.tensor(gradient, dtype=torch.float64)
        expected = torch.nn.utils.clip_grad_norm_(theirs, most or float("inf"))
        optimizer.step()
        kernels.call("adamw", *gradients, *ours, *moments, *scalars(step), settings, LOSS, norm, factor)
        assert factor[0] == pytest.approx(min(1.0, most / norm[0]) if most else 1.0, rel=1e-5)
        assert norm[0] == pytest.approx(float(expected), rel=1e-6)
        for mine, other in zip(ours, theirs, strict=True):
            np.testing.assert_allclose(mine, other.detach().numpy(), rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("value", [np.nan, np.inf, 3e38])
def test_a_norm_that_is_not_finite_changes_nothing(kernels, value):
    random = Random(1)
    ours, gradients = ([random.normal(*shape) for shape in SHAPES] for _ in range(2))
    gradients[1][2, :9] = value
    moments = [random.normal(sum(one.size for one in ours)) for _ in range(2)]
    before = [one.copy() for one in (*ours, *moments)]
    settings, norm = numbers(*BETAS, EPS, 1.0, *DECAYS, *RATES), np.zeros(1, np.float32)
    kernels.call("adamw", *gradients, *ours, *moments, *scalars(1), settings, LOSS, norm, norm.copy())
    assert not np.isfinite(norm[0])
    for one, kept in zip((*ours, *moments), before, strict=True):
        np.testing.assert_array_equal(one, kept)
