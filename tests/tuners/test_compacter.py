"""What Compacter's Kronecker products bring with them (its training: tests/parity/test_adapterhub.py)."""

from __future__ import annotations

import mindspore as ms
import numpy as np
import pytest
from mindspore import Tensor
from safetensors.numpy import load_file

from mindpeft import CompacterConfig, CompacterPlusPlusConfig, PeftModel
from mindpeft.errors import InputError
from mindpeft.tuners.compacter import weight_of
from tests.tuners.adapterhub import EXPECTED, fresh, logits, make_base, opened, randomised

pytestmark = pytest.mark.usefixtures("graph_mode")


def test_pynative_mode(tmp_path):
    ms.set_context(mode=ms.PYNATIVE_MODE)
    found = logits(opened(tmp_path, "shared_matrices"))
    np.testing.assert_allclose(found, EXPECTED["shared_matrices/logits"], atol=1e-5)


def test_weight_is_a_sum_of_kronecker_products():
    random = np.random.default_rng(0)
    rule, matrix = random.normal(size=(3, 3, 3)), random.normal(size=(3, 4, 2))
    expected = sum(np.kron(rule[i], matrix[i]) for i in range(3)).T
    found = weight_of(Tensor(rule, ms.float32), Tensor(matrix, ms.float32)).asnumpy()
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_switching_among_compacters_and_off(tmp_path):
    model = opened(tmp_path, "compacter", "shared_matrices")
    for name in ("compacter", "shared_matrices", "compacter"):
        model.set_adapter(name)
        np.testing.assert_allclose(logits(model), EXPECTED[f"{name}/logits"], atol=1e-5)
    with model.disable_adapter():
        np.testing.assert_array_equal(logits(model), logits(make_base()))
    assert len(model.compile_cache) == 1


@pytest.mark.parametrize(
    "options", [{}, {"shared_W_phm": True, "factorized_phm_rule": True, "learn_phm": False}]
)
def test_our_own_folder_opens_again(tmp_path, options):
    model = randomised(fresh(CompacterPlusPlusConfig(reduction_factor=4, **options)))
    model.save_pretrained(tmp_path)
    names = load_file(tmp_path / "adapter_model.safetensors").keys()
    assert {"base_model.model.phm_rule", "base_model.model.phm_rule_left"} & names
    np.testing.assert_array_equal(logits(PeftModel.from_pretrained(make_base(), tmp_path)), logits(model))


@pytest.mark.parametrize("shared", [True, False])
def test_learn_phm_decides_whether_rules_are_trained(shared):
    options = {"reduction_factor": 4, "shared_phm_rule": shared}
    learnt, fixed = (
        {p.name: p.size for p in fresh(CompacterConfig(learn_phm=learn, **options)).trainable_params()}
        for learn in (True, False)
    )
    rules = {name for name in learnt if "phm_rule" in name}
    assert len(rules) == (1 if shared else 8)
    assert learnt.keys() - fixed.keys() == rules
    model = fresh(CompacterConfig(learn_phm=False, **options))
    assert model.get_nb_trainable_parameters()[0] == sum(fixed.values())


@pytest.mark.parametrize(
    ("options", "spread"),
    [
        ({"phm_init_range": 0.3}, 0.3),
        ({"phm_c_init": "uniform"}, 3**-0.5),
        ({"shared_phm_rule": False}, 0.01),
        ({"shared_phm_rule": False, "phm_c_init": "uniform"}, 0.01 * 3**-0.5),
    ],
)
def test_initial_values(options, spread):
    model = fresh(CompacterConfig(reduction_factor=2, phm_dim=8, phm_rank=4, **options))
    values = {parameter.name: parameter.asnumpy() for parameter in model.trainable_params()}
    for name, value in values.items():
        if "phm_rule" in name:
            assert value.std() == pytest.approx(spread, rel=0.2), name
        elif ".W_" in name:  # Glorot's
            assert value.std() == pytest.approx((2 / sum(value.shape[1:])) ** 0.5, rel=0.3), name
        else:
            assert (value == 0).all(), name
    rules = [value for name, value in values.items() if "phm_rule" in name]
    assert len(rules) == 1 or not np.array_equal(rules[0], rules[1])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"reduction_factor": 32}, "phm_dim 4 must divide both the hidden size 48 and .* width 1"),
        ({"phm_dim": 5}, "phm_dim 5 must divide both the hidden size 48"),
        ({"phm_dim": 0}, "phm_dim must be a positive integer"),
        ({"phm_rank": 0}, "phm_rank must be a positive integer"),
        ({"phm_init_range": 0.0}, "phm_init_range must be greater than 0"),
        ({"phm_c_init": "norm"}, "phm_c_init must be one of normal, uniform.* did you mean 'normal'"),
        ({"hypercomplex_nonlinearity": "relu"}, "hypercomplex_nonlinearity must be one of phm, "),
        ({"init_weights": "houlsby"}, 'init_weights must be "bert" with phm_layer'),
        ({"shared_W_phm": True, "factorized_phm_W": False}, "shared_W_phm needs factorized_phm_W"),
        ({"shared_W_phm": True, "reduction_factor": {"default": 4}}, "needs one reduction_factor"),
        ({"learn_phm": None}, "learn_phm must be one of True, False"),
    ],
)
def test_bad_configs_are_refused(options, message):
    with pytest.raises(InputError, match=message):
        fresh(CompacterConfig(**{"reduction_factor": 4, **options}))
