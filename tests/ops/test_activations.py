"""Activations: the CPU's compositions, the plain ones and torch agree, gradients too."""

from __future__ import annotations

import mindspore as ms
import mindspore.nn as nn
import numpy as np
import pytest
import torch
from transformers.activations import ACT2FN

from mindpeft.errors import InputError
from mindpeft.ops.activations import ACTIVATIONS, CpuGelu, CpuTanh, Gelu, activation
from tests.ops.compare import assert_close, run, run_torch

# An odd shape, all around zero, where tanh and erf saturate, and far outside.
VALUES = np.concatenate([np.linspace(-9, 9, 181), [-100, -30, 0, 1e-7, 30, 100, 1e4, -1e4]]).astype(
    np.float32
)
VALUES = VALUES.reshape(3, 7, 9)


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_every_activation_equals_transformers(name):
    # float32 erf and exp are good to some 1e-7 of the value; near zero the absolute error counts
    assert_close(run(activation(name), VALUES), run_torch(ACT2FN[name], VALUES), 2e-6)


@pytest.mark.parametrize(
    ("fast", "plain", "theirs"), [(CpuGelu, Gelu, torch.nn.GELU()), (CpuTanh, nn.Tanh, torch.tanh)]
)
def test_cpu_compositions_equal_the_plain_ones(fast, plain, theirs):
    values = VALUES[np.abs(VALUES) < 50].reshape(1, -1)
    found = run(fast(), values)
    assert_close(found, run_torch(theirs, values), 1e-6)
    assert_close(found, run(plain(), values), 2e-4)  # the CPU's own tanh is off by 1e-4


@pytest.mark.parametrize("name", ["gelu", "gelu_new", "relu", "silu", "tanh"])
def test_float16(name):
    values = VALUES[np.abs(VALUES) <= 9].reshape(-1, 3).astype(np.float16)
    assert_close(run(activation(name), values), run_torch(ACT2FN[name], values), 4e-3)
    assert activation(name)(ms.Tensor(values)).dtype == ms.float16


def test_an_unknown_name_is_refused():
    with pytest.raises(InputError, match=r"unknown activation 'gelo'.*did you mean 'gelu'"):
        activation("gelo")
