"""WaveFT against torch + peft on twin models."""

from __future__ import annotations

import mindspore as ms
import numpy as np
import peft
import pytest
import torch
from mindspore import Tensor, nn
from peft.tuners.waveft.layer import WaveFTLinear as TheirLinear
from peft.tuners.waveft.wavelet import Wavelet
from peft.utils.constants import TRANSFORMERS_MODELS_TO_WAVEFT_TARGET_MODULES_MAPPING

from mindpeft import PeftModel, get_peft_model
from mindpeft.errors import InputError
from mindpeft.tuners.waveft import FAMILIES, WaveFTConfig, coefficient_places, low_pass, synthesis
from tests.tuners import against_peft as check

pytestmark = pytest.mark.usefixtures("graph_mode")

WAVEFT = check.Method("WaveFTConfig", {"n_frequency": 20, "scaling": 3.0, "init_weights": False}, noise=0.1)
OPTIONS = {
    "default_targets": {"bias": "waveft_only"},
    "patterns": {
        "target_modules": ["dense", "intermediate"],
        "exclude_modules": ["layer.2.output.dense"],
        "n_frequency_pattern": {"intermediate": 7},
        "wavelet_family": "db3",
        "random_loc_seed": 5,
        "task_type": "SEQ_CLS",
    },
    "conv1d": {"target_modules": ["c_attn"], "use_idwt": False},
    "proportional": {"target_modules": ["query", "intermediate"], "proportional_parameters": True},
}


@check.each_option(OPTIONS)
def test_reads_what_peft_wrote(mode, twins, tmp_path, name):
    check.check_reading(twins, tmp_path, WAVEFT, **OPTIONS[name])


def test_peft_reads_what_we_wrote(twins, tmp_path):
    check.check_writing(twins, tmp_path, WAVEFT, **OPTIONS["patterns"])


def test_pynative_gives_the_same(twins, tmp_path):
    check.check_pynative(twins, tmp_path, WAVEFT, **OPTIONS["patterns"])


@pytest.mark.parametrize("init", [True, False])
def test_initial_values(twins, init):
    check.check_initial_values(twins, WAVEFT, init_weights=init, n_frequency=200)


def test_switching(twins):
    other = {"random_loc_seed": 3}
    check.check_switching(twins, WAVEFT, OPTIONS["default_targets"], OPTIONS["patterns"], other)


@pytest.mark.parametrize("family", FAMILIES)
def test_filters_and_deltas_are_pefts(family):
    np.testing.assert_allclose(low_pass(family), Wavelet(family).rec_lo, atol=1e-9)
    for n_out, n_in in ((16, 16), (15, 16), (24, 17), (5, 9)):
        options = {"n_frequency": 20, "wavelet_family": family, "init_weights": False, "scaling": 2.0}
        theirs = TheirLinear(torch.nn.Linear(n_in, n_out), "a", peft.WaveFTConfig(**options), 20)
        rows, columns = (synthesis(family, size) for size in (n_out, n_in))
        sparse = np.zeros(rows.shape[1] * columns.shape[1])
        places = coefficient_places(WaveFTConfig(**options), n_out, n_in, 20)
        sparse[places] = 2 * theirs.waveft_spectrum["a"].detach().numpy()
        delta = rows @ sparse.reshape(rows.shape[1], -1) @ columns.T
        np.testing.assert_allclose(delta, theirs.get_delta_weight("a").detach().numpy(), atol=1e-6)


def test_default_targets_are_pefts():
    assert dict(TRANSFORMERS_MODELS_TO_WAVEFT_TARGET_MODULES_MAPPING) == WaveFTConfig.DEFAULT_TARGETS


def test_coiflets_are_refused_by_name(twins, tmp_path):
    WAVEFT.in_peft(twins, tmp_path, wavelet_family="coif1")
    with pytest.raises(InputError, match=r"wavelet_family must be one of db1, .*, not 'coif1'"):
        PeftModel.from_pretrained(twins.make_model(), tmp_path)


def test_half_precision_base_keeps_a_float32_adapter():
    cell = nn.SequentialCell(nn.Dense(8, 8, dtype=ms.float16))
    model = get_peft_model(cell, WAVEFT.ours(target_modules=["0"]))
    assert {str(p.dtype) for p in model.trainable_params()} == {"Float32"}
    x = Tensor(np.random.default_rng(0).normal(size=(3, 8)).astype(np.float16))
    y = model(x)
    assert y.dtype == ms.float16
    model.merge_adapter()
    np.testing.assert_allclose(y.asnumpy(), model(x).asnumpy(), atol=3e-2)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"n_frequency": 0}, "n_frequency must be a positive integer, not 0"),
        ({"n_frequency": 257}, "n_frequency=257 is more than .* has places for, which is 256"),
        (
            {"n_frequency_pattern": {"query": "7"}},
            r"n_frequency_pattern\['query'\] must be a positive integer",
        ),
        ({"wavelet_family": "db11"}, "wavelet_family must be one of db1, .*, not 'db11'; did you mean 'db1"),
        ({"scaling": "1"}, "scaling must be a number"),
        ({"random_loc_seed": -1}, "random_loc_seed must be an integer, 0 or more"),
        ({"bias": "lora_only"}, "bias must be one of none, all, waveft_only"),
        ({"target_modules": ["words"]}, "WaveFT can't wrap the cell 'words' of class Embedding"),
    ],
)
def test_mistakes(twins, options, message):
    with pytest.raises(InputError, match=message):
        get_peft_model(twins.make_model(), WaveFTConfig(**options))
