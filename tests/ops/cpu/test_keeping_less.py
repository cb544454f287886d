"""Kernels that keep tensors for the backward pass in bfloat16: the same values, nearly the same gradients."""

from __future__ import annotations

import mindspore as ms
import pytest
from mindspore import Tensor, nn

from mindpeft.nn import LayerNorm, Linear
from mindpeft.ops.activations import activation
from mindpeft.ops.cpu.activations import ActivationKernel, GateKernel
from mindpeft.ops.cpu.attention import AttentionKernel, MaskedAttentionKernel
from mindpeft.ops.cpu.norms import LayerNormKernel, RmsNormKernel
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
CASES = {
    "activation": (ActivationKernel("gelu"), [random.normal(*ROWS)], []),
    "gate": (GateKernel("silu"), [random.normal(*ROWS), random.normal(*ROWS)], []),
    "rms norm": (RmsNormKernel(1e-6), [random.normal(*ROWS), random.normal(33)], []),
    "layer norm": (LayerNormKernel(1e-6), [random.normal(*ROWS), random.normal(33), random.normal(33)], []),
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

    (value, *gradients), (same, *rounded) = results(kernel), results(kernel.keeping_less())
    assert (value == same).all()
    assert 1e-5 < error(rounded, gradients) < 2**-6


def test_a_model_changes_all_of_its_kernels():
    cells = nn.SequentialCell(Linear(4, 4), activation("gelu"), LayerNorm(4))
    before = {name: type(cell) for name, cell in cells.cells_and_names()}
    keep_less(cells)
    assert {name: type(cell) for name, cell in cells.cells_and_names()} == before
    assert cells[1].kernel.less
    assert cells[2].norm.kernel.less
