"""Kernels that keep tensors for the backward pass in bfloat16: the same values, nearly the same gradients."""

from __future__ import annotations

import mindspore as ms
import numpy as np
import pytest
from mindspore import Tensor, nn

from mindpeft.nn import LayerNorm, Linear
from mindpeft.ops.activations import activation
from mindpeft.ops.cpu.activations import ActivationKernel, GateKernel
from mindpeft.ops.cpu.attention import AttentionKernel, MaskedAttentionKernel
from mindpeft.ops.cpu.linear import LoraBiasKernel, LoraKernel
from mindpeft.ops.cpu.norms import (
    LayerNormKernel,
    LayerNormOfSumKernel,
    RmsNormKernel,
    RmsNormOfSumKernel,
)
from mindpeft.precision import keep_less
from tests.ops.compare import run
from tests.ops.cpu import native
from tests.ops.cpu.cases import Random
from tests.ops.cpu.expected import error

random = Random(3)
ROWS, HEADS = (3, 7, 33), (2, 4, 9, 8)
QKV = tuple(random.normal(*shape) for shape in (HEADS, (2, 2, 11, 8), (2, 2, 11, 8)))
SILENCE = Tensor(native.SILENCE)
MASK = Tensor(random.normal(2, 1, 9, 11))
VECTOR = random.normal(33)
SUM = random.normal(*ROWS), random.normal(*ROWS)
CASES = {
    "activation": (ActivationKernel("gelu"), [random.normal(*ROWS)], []),
    "gate": (GateKernel("silu"), [random.normal(*ROWS), random.normal(*ROWS)], []),
    "rms norm": (RmsNormKernel(1e-6), [random.normal(*ROWS), random.normal(33)], []),
    "layer norm": (LayerNormKernel(1e-6), [random.normal(*ROWS), random.normal(33), random.normal(33)], []),
    "rms norm of a sum": (RmsNormOfSumKernel(1e-6, with_sum=False), [*SUM, VECTOR], []),
    "rms norm and sum": (RmsNormOfSumKernel(1e-6, with_sum=True), [*SUM, VECTOR], []),
    "layer norm of a sum": (LayerNormOfSumKernel(1e-6, with_sum=False), [*SUM, VECTOR, VECTOR], []),
    "layer norm and sum": (LayerNormOfSumKernel(1e-6, with_sum=True), [*SUM, VECTOR, VECTOR], []),
    "attention": (AttentionKernel(0.3, 0.0), QKV, [SILENCE]),
    "masked attention": (MaskedAttentionKernel(0.3, 5.0), QKV, [MASK, SILENCE]),
}


@pytest.mark.parametrize("mode", [ms.PYNATIVE_MODE, ms.GRAPH_MODE])
@pytest.mark.parametrize("name", CASES)
def test_the_same_values_and_gradients_of_eight_bits(name, mode):
    ms.set_context(mode=mode)
    kernel, inputs, rest = CASES[name]

    def results(cell):
        def call(*tensors):
            out = cell(*tensors, *rest)
            return out[0] if isinstance(out, tuple) else out

        return run(call, *inputs)

    assert_nearly_same(results(kernel), results(kernel.keeping_less()))


def assert_nearly_same(plain, less):
    """Values are the same, gradients have lost some of their bits."""
    assert (plain[0] == less[0]).all()
    assert 1e-5 < error(less[1:], plain[1:]) < 2**-6


@pytest.mark.parametrize("mode", [ms.PYNATIVE_MODE, ms.GRAPH_MODE])
@pytest.mark.parametrize("noise", [native.SILENCE, np.array([0.5, 2, 0.3, -0.7], np.float32)])
@pytest.mark.parametrize("cell", [LoraKernel, LoraBiasKernel])
def test_lora(cell, noise, mode):
    ms.set_context(mode=mode)
    inputs = [random.normal(2, 6, 17), *(random.normal(*shape) for shape in ((33, 17), (3, 17), (33, 3)))]
    bias = [Tensor(random.normal(33))] if cell is LoraBiasKernel else []
    rest = [Tensor([0.5], ms.float32), Tensor(noise), *bias]

    def results(kernel):
        def call(*tensors):
            return kernel(*tensors, *rest)[0]

        return run(call, *inputs)

    assert_nearly_same(results(cell()), results(cell(less=True)))


def test_a_model_changes_all_of_its_kernels():
    cells = nn.SequentialCell(Linear(4, 4), activation("gelu"), LayerNorm(4))
    before = {name: type(cell) for name, cell in cells.cells_and_names()}
    keep_less(cells)
    assert {name: type(cell) for name, cell in cells.cells_and_names()} == before
    assert cells[1].kernel.less
    norm = cells[2].norm
    assert all(kernel.less for kernel in (norm.kernel, norm.kernel_of_sum, norm.kernel_with_sum))
    assert [norm.kernel_of_sum.with_sum, norm.kernel_with_sum.with_sum] == [False, True]
