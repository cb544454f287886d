"""The norm of a residual sum: by one kernel or as a sum and a norm, the same."""

from __future__ import annotations

from contextlib import nullcontext

import mindspore as ms
import numpy as np
import pytest
from mindspore import Tensor, nn, ops

from mindpeft.nn import LayerNorm, RMSNorm, norm_and_sum, norm_of_sum
from mindpeft.ops.cpu import kernels_on
from mindpeft.ops.cpu.library import without_kernels
from tests.ops.compare import assert_close, run

WIDTH = 33
NORMS = {
    "layer norm": lambda **options: LayerNorm(WIDTH, **options),
    "layer norm of constants": lambda **options: LayerNorm(WIDTH, affine=False, **options),
    "rms norm": lambda **options: RMSNorm(WIDTH, **options),
    "rms norm with offset": lambda **options: RMSNorm(WIDTH, offset=1.0, **options),
}
rng = np.random.default_rng(0)
X, RESIDUAL = rng.normal(size=(2, 3, 5, WIDTH)).astype(np.float32)

pytestmark = pytest.mark.usefixtures("mode")


class Around(nn.Cell):
    """A layer of an adapter, as far as its place goes."""

    def __init__(self, base_layer: nn.Cell):
        super().__init__()
        self.base_layer = base_layer

    def construct(self, x):
        return self.base_layer(x)


class Sums(nn.Cell):
    """What both functions give of a norm."""

    def __init__(self, norm: nn.Cell):
        super().__init__()
        self.norm = norm

    def construct(self, x, residual):
        normed, total = norm_and_sum(self.norm, x, residual)
        return ops.stack((norm_of_sum(self.norm, x, residual), normed, total))


def made(kind: str, dtype: ms.Type = ms.float32) -> nn.Cell:
    """A norm with random parameters."""
    norm, random = NORMS[kind](dtype=dtype), np.random.default_rng(1)
    for parameter in norm.get_parameters():
        parameter.set_data(Tensor(random.normal(1, 0.3, WIDTH), dtype))
    return norm


def composed(norm: nn.Cell):
    def sums(x, residual):
        total = x + residual
        return ops.stack((norm(total), norm(total), total))

    return sums


@pytest.mark.parametrize("kind", NORMS)
@pytest.mark.parametrize("around", [False, True])
@pytest.mark.parametrize("kernels", [False, True])
def test_equals_the_composition(kind, around, kernels):
    norm = made(kind)
    expected = run(composed(norm), X, RESIDUAL)
    with nullcontext() if kernels else without_kernels(norm):
        found = run(Sums(Around(norm) if around else norm), X, RESIDUAL)
    assert_close(found, expected, 1e-5)


@pytest.mark.parametrize("kind", NORMS)
def test_gradients_of_parameters(kind):
    norm = made(kind)
    parameters = ms.ParameterTuple(norm.trainable_params())
    if not len(parameters):
        return

    def gradients(sums):
        def total(x, residual):
            return (sums(x, residual) ** 2).sum()

        return ms.grad(total, None, parameters)(Tensor(X), Tensor(RESIDUAL))

    found, expected = gradients(Sums(norm)), gradients(composed(norm))
    assert_close([g.asnumpy() for g in found], [g.asnumpy() for g in expected], 1e-5)


@pytest.mark.parametrize("kind", NORMS)
def test_one_kernel_does_it_unless_something_is_in_the_way(kind):
    """The composition goes through the norm's own kernel, which is broken here."""
    if not kernels_on():
        pytest.skip("no kernels here")
    norm, half = made(kind), RESIDUAL.astype(np.float16)
    norm.norm.kernel = norm.norm.plain = Broken()
    Sums(norm)(Tensor(X), Tensor(RESIDUAL))
    for cell, residual in ((Around(norm), RESIDUAL), (norm, RESIDUAL[:1]), (norm, half)):
        with pytest.raises(Exception, match="broken"):
            Sums(cell)(Tensor(X), Tensor(residual))


class Broken(nn.Cell):
    def construct(self, *_):
        raise ValueError("broken")


@pytest.mark.parametrize("kind", NORMS)
def test_other_dtypes_and_shapes(kind):
    for norm, x, residual in (
        (made(kind, ms.float16), X.astype(np.float16), RESIDUAL.astype(np.float16)),
        (made(kind), X, RESIDUAL[:1]),
    ):
        expected = run(composed(norm), x, residual)
        assert_close(run(Sums(norm), x, residual), expected, 1e-2 if x.dtype == np.float16 else 1e-5)


def test_a_hook_sees_every_call(mode):
    if mode == "graph":
        pytest.skip("a hook is part of the graph there")
    norm, seen = made("layer norm"), []
    handle = norm.register_forward_hook(lambda cell, inputs, output: seen.append(output))
    expected = Sums(norm)(Tensor(X), Tensor(RESIDUAL)).asnumpy()
    assert [output.shape for output in seen] == [X.shape] * 2
    handle.remove()
    np.testing.assert_allclose(Sums(norm)(Tensor(X), Tensor(RESIDUAL)).asnumpy(), expected, atol=1e-5)
    assert len(seen) == 2
