"""Products with the sum of a weight and a delta weight against torch."""

from __future__ import annotations

import numpy as np
import pytest
from mindspore import Tensor

from mindpeft.ops.cpu.delta import DeltaKernel, SparseDeltaKernel
from mindpeft.ops.delta import DeltaProduct, SparseDeltaProduct
from tests.ops.cpu.cases import DELTA_PRODUCTS, Case, Random, delta_case, some
from tests.ops.cpu.cells import assert_equals_torch
from tests.ops.cpu.expected import error, expectation, worst

SEED = 0  # of a case with some numbers in the sparse delta


def with_places(cell, case: Case):
    """A Cell as a function of what has gradients: the places of a sparse delta come before the bias."""
    places = [Tensor(value) for value in case.fixed]
    return lambda x, weight, delta, *bias: cell(x, weight, delta, *places, *bias)


@pytest.mark.parametrize("family", DELTA_PRODUCTS)
def test_equals_torch(kernels, family, seed):
    assert worst(kernels, some(family, 60, seed)) < 1e-5


@pytest.mark.parametrize("rows", [32, 33])
@pytest.mark.parametrize("family", DELTA_PRODUCTS)
def test_few_rows_and_more(kernels, family, rows):
    """Few take two products, more take one with the sum."""
    assert worst(kernels, [delta_case(Random(seed), family, (rows,), 17, 65) for seed in range(9)]) < 1e-5


@pytest.mark.parametrize("share", [10, 15])
def test_gradients_of_few_places_and_of_many(kernels, share):
    """Few are computed by themselves, many picked from the whole product."""
    random = Random(share)
    flat = random.generator.permutation(65 * 17)[: 65 * 17 // share]
    places = np.stack(np.divmod(flat, 17)).astype(np.int32)
    inputs = random.normal(300, 17), random.normal(65, 17), random.normal(flat.size)
    assert worst(kernels, [Case("sparse_delta_linear", inputs, (places,))]) < 1e-5


@pytest.mark.parametrize("lead", [(2, 6), (50,), (0,)])
@pytest.mark.parametrize("family", DELTA_PRODUCTS)
def test_cells(family, lead):
    kind = SparseDeltaKernel if family.startswith("sparse") else DeltaKernel
    case = delta_case(Random(SEED), family, lead, 17, 33)
    assert_equals_torch(with_places(kind(bias=family.endswith("bias")), case), case)


@pytest.mark.parametrize("family", DELTA_PRODUCTS)
def test_without_kernels(family):
    product = SparseDeltaProduct() if family.startswith("sparse") else DeltaProduct()
    product.kernel = None
    case = delta_case(Random(SEED), family, (2, 6), 17, 33)
    assert_equals_torch(with_places(product, case), case)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("family", DELTA_PRODUCTS)
def test_one_bad_number_goes_where_it_goes_in_torch(kernels, family, value):
    """Of many rows; two products of a few may give NaN for an infinity."""
    case = delta_case(Random(SEED), family, (50,), 17, 33)
    for place in range(len(case.inputs)):
        inputs = [array.copy() for array in case.inputs]
        inputs[place].flat[min(inputs[place].size - 1, 5)] = value
        bad = Case(family, tuple(inputs), case.fixed)
        assert error(bad.run(kernels), expectation(bad)) < 1e-5, place
