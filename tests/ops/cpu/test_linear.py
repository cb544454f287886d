"""Dense products, with LoRA and without, against torch."""

from __future__ import annotations

import mindspore as ms
import numpy as np
import pytest
from mindspore import Tensor

from mindpeft.ops.cpu.linear import LinearBiasKernel, LinearKernel, LoraBiasKernel, LoraKernel
from mindpeft.ops.linear import Product
from tests.ops.cotangent import on_bfloat16_grid
from tests.ops.cpu import native
from tests.ops.cpu.cases import PRODUCTS, Case, Random, few_rows, numbers, some
from tests.ops.cpu.cells import assert_equals_torch
from tests.ops.cpu.expected import error, expectation, worst

CELLS = {
    "linear": LinearKernel,
    "linear_bias": LinearBiasKernel,
    "lora": LoraKernel,
    "lora_bias": LoraBiasKernel,
}
IN, OUT, RANK = 17, 33, 3


def inputs_of(family: str, lead: tuple[int, ...], random: Random) -> Case:
    """A case of given rows."""
    inputs = [random.normal(*lead, IN), random.normal(*((IN, OUT) if "turned" in family else (OUT, IN)))]
    if family.startswith("lora"):
        inputs += [random.normal(RANK, IN), random.normal(OUT, RANK)]
    if family.endswith("bias"):
        inputs.append(random.normal(OUT))
    return Case(family, tuple(inputs), (numbers(0.5),) if family.startswith("lora") else ())


@pytest.mark.parametrize("kind", ["", " bfloat16"])
@pytest.mark.parametrize("family", PRODUCTS)
def test_equals_torch(kernels, family, kind, seed):
    assert worst(kernels, some(family + kind, 30, seed)) < 1e-5


@pytest.mark.parametrize("family", PRODUCTS)
def test_cells(family):
    cell = CELLS[family.replace("_turned", "")](turned="turned" in family)

    def call(*inputs):
        if not family.startswith("lora"):
            return cell(*inputs)
        return cell(*inputs[:4], Tensor([0.5], ms.float32), Tensor(native.SILENCE), *inputs[4:])[0]

    assert_equals_torch(call, inputs_of(family, (2, 6), Random(0)))
    assert_equals_torch(call, inputs_of(family, (0,), Random(0)))


def test_bfloat16_weight_of_a_cell():
    """A trained one gets its gradient in bfloat16, so the tolerance is that of its eight bits."""
    cell = LinearBiasKernel()
    case = some("linear_bias bfloat16", 3, 7)[2]
    assert_equals_torch(lambda x, w, bias: cell(x, w.astype(ms.bfloat16), bias), case, 2**-8)


def test_a_bias_of_another_precision_is_widened():
    case = inputs_of("linear_bias", (2, 3), Random(5))
    x, weight, bias = (on_bfloat16_grid(value) for value in case.inputs)
    found = Product()(Tensor(x), Tensor(weight).astype(ms.bfloat16), Tensor(bias).astype(ms.bfloat16))
    expected = expectation(Case("linear_bias", (x, weight, bias)))[:1]
    assert error([found.asnumpy()], expected) < 1e-5


@pytest.mark.parametrize(("rows", "tolerance"), [(8, 1e-5), (9, 2**-7)])
def test_numbers_beside_a_bfloat16_weight_are_rounded_from_nine_rows_on(kernels, rows, tolerance):
    case = inputs_of("linear", (rows,), Random(3))
    weight = on_bfloat16_grid(case.inputs[1])
    case = Case("linear", (case.inputs[0], weight), bfloat16=True)
    found, expected = case.run(kernels)[:1], expectation(case)[:1]
    assert error(found, expected) < tolerance
    rounds = bool(kernels.library.has_fast_bfloat16_products())
    assert (error(found, expected) < 1e-5) == (rows == 8 or not rounds)


@pytest.mark.parametrize("case", few_rows(Random(4)), ids=lambda case: str(case.inputs[0].shape))
def test_few_rows_beside_a_bfloat16_weight(kernels, case):
    """On matrix units they are not rounded up to 16 rows, elsewhere up to 8."""
    rounds = len(case.inputs[0]) > 8 and not kernels.library.has_matrix_units()
    found, expected = case.run(kernels), expectation(case)
    assert error(found[:1], expected[:1]) < (2**-7 if rounds else 1e-5)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 3.4e38])
def test_few_rows_keep_an_odd_number_in_its_row(kernels, value):
    x, weight = Random(6).normal(5, 64), on_bfloat16_grid(Random(7).normal(48, 64) / 64)
    x[2, 7] = value
    case = Case("linear", (x, weight), bfloat16=True)
    assert error(case.run(kernels)[:1], expectation(case)[:1]) < 1e-5


def test_rounding_is_to_the_nearest_even_bfloat16(kernels):
    """A product with 1 gives each number as it was rounded, NaN and infinity as they are."""
    half = 2.0**-8  # of the last place of bfloat16 at 1
    values = numbers(7, 1, 1 + half, 1 + 3 * half, 1 + half * 1.01, -1 - half, 3.4e38, np.inf, -np.inf)
    expected = numbers(7, 1, 1, 1 + 4 * half, 1 + 2 * half, -1, np.inf, np.inf, -np.inf)
    one = native.to_bfloat16(np.ones((1, 1), np.float32))
    found = kernels.one("linear", values[:, None], one, to=(9, 1))[:, 0]
    np.testing.assert_array_equal(found, expected)
    assert np.isnan(kernels.one("linear", np.full((9, 1), np.nan, np.float32), one, to=(9, 1))).all()


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("rows", [1, 8, 20])
@pytest.mark.parametrize("family", PRODUCTS)
def test_one_bad_number_goes_where_it_goes_in_torch(kernels, family, rows, value):
    case = inputs_of(family, (rows,), Random(1))
    for place in range(len(case.inputs)):
        inputs = [array.copy() for array in case.inputs]
        inputs[place].flat[min(inputs[place].size - 1, 5)] = value
        bad = Case(family, tuple(inputs), case.fixed)
        assert error(bad.run(kernels), expectation(bad)) < 1e-5, place
