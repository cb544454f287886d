"""The LSTM against torch's, by the operator and step by step."""

from __future__ import annotations

import mindspore as ms
import numpy as np
import pytest
import torch
from mindspore import Tensor

from mindpeft.ops.lstm import bidirectional_lstm


@pytest.mark.parametrize("mode", [ms.GRAPH_MODE, ms.PYNATIVE_MODE])
@pytest.mark.parametrize("fused", [True, False])
def test_values_and_gradients_equal_torchs(mode, fused):
    ms.set_context(mode=mode)
    torch.manual_seed(0)
    theirs = torch.nn.LSTM(6, 5, bidirectional=True)
    x, weight = torch.randn(7, 6, requires_grad=True), torch.randn(7, 10)
    expected = theirs(x)[0]
    (expected * weight).sum().backward()
    tensors = [x, *theirs.parameters()]

    def weighted(*values):
        return (bidirectional_lstm(values[0], values[1:], fused) * factor).sum()

    factor = Tensor(weight.numpy())
    values = [Tensor(tensor.detach().numpy()) for tensor in tensors]
    loss, gradients = ms.value_and_grad(weighted, tuple(range(len(values))))(*values)
    assert float(loss) == pytest.approx(float((expected * weight).sum()), abs=1e-4)
    for found, tensor in zip(gradients, tensors, strict=True):
        scale = float(tensor.grad.abs().max())
        np.testing.assert_allclose(found.asnumpy(), tensor.grad.numpy(), atol=1e-4 * scale)
    ms.set_context(mode=ms.PYNATIVE_MODE)
    found = bidirectional_lstm(values[0], tuple(values[1:]), fused).asnumpy()
    np.testing.assert_allclose(found, expected.detach().numpy(), atol=1e-6)
