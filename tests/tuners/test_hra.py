"""HRA against torch + peft on twin models."""

from __future__ import annotations

import mindspore as ms
import numpy as np
import pytest
from mindspore import Tensor

from mindpeft import get_peft_model
from mindpeft.errors import InputError
from mindpeft.tuners.hra import HRAConfig
from tests.tuners import against_peft as check

pytestmark = pytest.mark.usefixtures("graph_mode")

HRA = check.Method("HRAConfig", {"init_weights": False, "r": 4})
OPTIONS = {
    "default_targets": {},
    "pairs": {"target_modules": ["dense"], "init_weights": True, "r": 6, "task_type": "SEQ_CLS"},
    "odd": {"target_modules": ["key", "value"], "r": 3, "bias": "hra_only"},
    "gram_schmidt": {"target_modules": ["dense", "query"], "apply_GS": True, "bias": "all"},
    "layers": {
        "target_modules": ["dense"],
        "layers_to_transform": [1],
        "exclude_modules": ["attention.output.dense"],
    },
}


@check.each_option(OPTIONS)
def test_reads_what_peft_wrote(mode, twins, tmp_path, name):
    check.check_reading(twins, tmp_path, HRA, **OPTIONS[name])


@pytest.mark.parametrize("name", ["pairs", "gram_schmidt"])
def test_peft_reads_what_we_wrote(twins, tmp_path, name):
    check.check_writing(twins, tmp_path, HRA, **OPTIONS[name])


@pytest.mark.parametrize("name", ["odd", "gram_schmidt"])
def test_pynative_gives_the_same(twins, tmp_path, name):
    check.check_pynative(twins, tmp_path, HRA, **OPTIONS[name])


@pytest.mark.parametrize("init", [True, False])
def test_initial_values(twins, init):
    check.check_initial_values(twins, HRA, init_weights=init)


def test_a_fresh_adapter_changes_nothing_to_speak_of(twins):
    model = get_peft_model(twins.make_model(), HRAConfig(target_modules=["dense", "intermediate"]))
    np.testing.assert_allclose(twins.logits(model), check.base_logits(twins), atol=1e-5)


def test_switching(twins):
    check.check_switching(twins, HRA, OPTIONS["default_targets"], OPTIONS["odd"], OPTIONS["pairs"])


def test_spare_columns_of_a_slot_never_train(twins):
    ms.set_seed(3)
    options = {"target_modules": ["dense"], "r": 2, "init_weights": False}
    model = get_peft_model(twins.make_model(), HRAConfig(**options), slot_rank=5)
    parameters = model.trainable_params()
    _, gradients = check.loss_and_gradients(model, parameters)(
        Tensor(twins.IDS), Tensor(check.LABELS, ms.int32)
    )
    for parameter, gradient in zip(parameters, gradients, strict=True):
        assert parameter.shape[1] == 5
        assert np.abs(gradient.asnumpy()[:, :2]).max() > 0
        assert np.abs(gradient.asnumpy()[:, 2:]).max() == 0


def test_no_gradient_is_lost_while_another_adapter_acts(twins):
    """An empty slot must not poison the gradient that passes it."""
    model = HRA.here(twins, target_modules=["dense"])
    model.add_adapter("other", HRA.ours(target_modules=["query"]))
    model.set_adapter("other")
    parameters = model.trainable_params()
    _, gradients = check.loss_and_gradients(model, parameters)(
        Tensor(twins.IDS), Tensor(check.LABELS, ms.int32)
    )
    assert len(gradients) == twins.LAYERS
    for gradient in gradients:
        assert np.isfinite(gradient.asnumpy()).all()
        assert np.abs(gradient.asnumpy()).max() > 0


def test_half_precision_base_keeps_a_float32_adapter():
    check.check_half_precision(HRAConfig(target_modules=["0"], init_weights=False, r=2))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"r": 0}, "r must be a positive integer, not 0"),
        ({"r": True}, "r must be a positive integer, not True"),
        ({"bias": "hra"}, "bias must be one of none, all, hra_only, not 'hra'"),
        ({"layers_pattern": "layer"}, "layers_pattern needs layers_to_transform"),
        ({"layers_to_transform": ["1"]}, "layers_to_transform must be an integer or a list of integers"),
        ({"target_modules": ["c_attn"]}, "HRA can't wrap the cell 'c_attn' of class Conv1D"),
        ({"target_modules": ["words"]}, "HRA can't wrap the cell 'words' of class Embedding"),
        ({"target_modules": ["qery"]}, "no cell matches target_modules qery.*did you mean 'query'"),
    ],
)
def test_mistakes(twins, options, message):
    with pytest.raises(InputError, match=message):
        get_peft_model(twins.make_model(), HRAConfig(**options))
