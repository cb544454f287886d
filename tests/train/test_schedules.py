from __future__ import annotations

import pytest
import torch
from transformers import get_scheduler

from mindpeft.errors import InputError
from mindpeft.train.schedules import get_schedule


@pytest.mark.parametrize("warmup", [0, 4])
@pytest.mark.parametrize("name", ["linear", "cosine", "constant"])
def test_values_equal_transformers(name, warmup):
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.5)
    oracle = get_scheduler("constant_with_warmup" if name == "constant" else name, optimizer, warmup, 20)
    schedule = get_schedule(name, warmup, 20)
    for step in range(21):
        assert 0.5 * schedule(step) == pytest.approx(oracle.get_last_lr()[0], abs=1e-12)
        optimizer.step()
        oracle.step()


def test_unknown_name():
    with pytest.raises(InputError, match="did you mean 'cosine'"):
        get_schedule("cosin", 0, 10)
