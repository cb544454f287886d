"""DeLoRA against torch + peft on twin models."""

from __future__ import annotations

import mindspore as ms
import numpy as np
import pytest
from mindspore import Tensor, nn

from mindpeft import get_peft_model
from mindpeft.errors import InputError
from mindpeft.tuners.delora import DeloraConfig
from tests.tuners import against_peft as check

pytestmark = pytest.mark.usefixtures("graph_mode")

DELORA = check.Method("DeloraConfig", {"init_weights": False, "delora_lambda": 2.0, "r": 4})
OPTIONS = {
    "default_targets": {"bias": "delora_only"},
    "patterns": {
        "target_modules": ["dense", "intermediate"],
        "exclude_modules": ["layer.2.output.dense"],
        "rank_pattern": {"intermediate": 2},
        "lambda_pattern": {"encoder.layer.1.output.dense": 3.5},
        "task_type": "SEQ_CLS",
    },
}


@check.each_option(OPTIONS)
def test_reads_what_peft_wrote(mode, twins, tmp_path, name):
    check.check_reading(twins, tmp_path, DELORA, **OPTIONS[name])


def test_peft_reads_what_we_wrote(twins, tmp_path):
    check.check_writing(twins, tmp_path, DELORA, **OPTIONS["patterns"])


def test_pynative_gives_the_same(twins, tmp_path):
    check.check_pynative(twins, tmp_path, DELORA, **OPTIONS["patterns"])


@pytest.mark.parametrize("init", [True, False])
def test_initial_values(twins, init):
    check.check_initial_values(twins, DELORA, target_modules=["intermediate", "query"], init_weights=init)


def test_switching(twins):
    check.check_switching(twins, DELORA, OPTIONS["default_targets"], OPTIONS["patterns"], {"r": 2})


def test_a_fresh_adapter_learns(twins):
    """B is zero then: its length must neither stop nor spoil the gradient, spare ranks' included."""
    config = DELORA.ours(target_modules=["query"], init_weights=True)
    model = get_peft_model(twins.make_model(), config, slot_rank=6)
    np.testing.assert_allclose(twins.logits(model), check.base_logits(twins), atol=1e-6)
    parameters = model.trainable_params()
    ids, labels = Tensor(twins.IDS), Tensor(check.LABELS, ms.int32)
    _, gradients = check.loss_and_gradients(model, parameters)(ids, labels)
    for parameter, gradient in zip(parameters, gradients, strict=True):
        assert np.isfinite(gradient.asnumpy()).all()
        if parameter.name.endswith("delora_B"):
            assert np.abs(gradient.asnumpy()[:, :4]).min() > 0
            assert np.abs(gradient.asnumpy()[:, 4:]).max() == 0


def test_dropout_acts_while_training_only(twins):
    model = DELORA.here(twins, module_dropout=0.5)
    plain = DELORA.here(twins)
    np.testing.assert_array_equal(twins.logits(model), twins.logits(plain))
    model.set_train(True)
    assert not np.array_equal(twins.logits(model), twins.logits(plain))


def test_half_precision_base_keeps_a_float32_adapter():
    cell = nn.SequentialCell(nn.Dense(8, 8, dtype=ms.float16))
    model = get_peft_model(cell, DELORA.ours(target_modules=["0"]))
    assert {str(p.dtype) for p in model.trainable_params()} == {"Float32"}
    x = Tensor(np.random.default_rng(0).normal(size=(3, 8)).astype(np.float16))
    y = model(x)
    assert y.dtype == ms.float16
    model.merge_adapter()
    np.testing.assert_allclose(y.asnumpy(), model(x).asnumpy(), atol=3e-2)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"r": 0}, "r must be a positive integer, not 0"),
        ({"rank_pattern": {"query": 0}}, r"rank_pattern\['query'\] must be a positive integer"),
        ({"lambda_pattern": {"query": "1"}}, r"lambda_pattern\['query'\] must be a number"),
        ({"delora_lambda": None}, "delora_lambda must be a number, not None"),
        ({"module_dropout": 1.0}, r"module_dropout must lie in \[0, 1\)"),
        ({"bias": "lora_only"}, "bias must be one of none, all, delora_only"),
        ({"target_modules": ["c_attn"]}, "DeLoRA can't wrap the cell 'c_attn' of class Conv1D"),
    ],
)
def test_mistakes(twins, options, message):
    with pytest.raises(InputError, match=message):
        get_peft_model(twins.make_model(), DeloraConfig(**options))
