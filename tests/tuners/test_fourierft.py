"""FourierFT against torch + peft on twin models."""

from __future__ import annotations

import numpy as np
import peft.utils.constants as theirs
import pytest
import torch
from mindspore import nn

from mindpeft import get_peft_model
from mindpeft.errors import InputError
from mindpeft.tuners import fourierft
from mindpeft.tuners.fourierft import FourierFTConfig, places_of
from tests.tuners import against_peft as check

pytestmark = pytest.mark.usefixtures("graph_mode")

FOURIERFT = check.Method("FourierFTConfig", {"n_frequency": 30, "scaling": 20.0})
OPTIONS = {
    "default_targets": {},
    "zeros": {"target_modules": ["dense", "intermediate"], "init_weights": True, "bias": "fourier_only"},
    "seed": {
        "target_modules": ["query"],
        "random_loc_seed": 2**33 + 5,
        "bias": "all",
        "task_type": "SEQ_CLS",
    },
    "conv1d": {"target_modules": ["c_attn"], "n_frequency": 256},
    "patterns": {
        "target_modules": ["query", "value"],
        "n_frequency_pattern": {
            "query": 7,
            "enc.*value": 9,  # PEFT wants a dot before it
            "encoder.layer.1.attention.self.value": 11,
        },
        "exclude_modules": ["layer.2.attention.self.query"],
    },
}


@check.each_option(OPTIONS)
def test_reads_what_peft_wrote(mode, twins, tmp_path, name):
    check.check_reading(twins, tmp_path, FOURIERFT, **OPTIONS[name])


@pytest.mark.parametrize("name", ["patterns", "conv1d"])
def test_peft_reads_what_we_wrote(twins, tmp_path, name):
    check.check_writing(twins, tmp_path, FOURIERFT, **OPTIONS[name])


def test_pynative_gives_the_same(twins, tmp_path):
    check.check_pynative(twins, tmp_path, FOURIERFT, **OPTIONS["conv1d"])


@pytest.mark.parametrize("init", [True, False])
def test_initial_values(twins, init):
    check.check_initial_values(twins, FOURIERFT, init_weights=init)


def test_switching(twins):
    """Also between seeds, in one slot."""
    choices = ({}, {"random_loc_seed": 1}, OPTIONS["patterns"], {"scaling": 3.0})
    check.check_switching(twins, FOURIERFT, *choices)


@pytest.mark.parametrize(
    ("seed", "size", "count"),
    [(777, 768 * 768, 1000), (0, 7, 7), (1, 1, 1), (5, 384, 383), (2**40 + 3, 100, 100)],
)
def test_places_are_torchs(seed, size, count):
    expected = torch.randperm(size, generator=torch.Generator().manual_seed(seed))[:count]
    np.testing.assert_array_equal(places_of(seed, size, count), expected.numpy())


def test_default_targets_are_pefts():
    assert FourierFTConfig.DEFAULT_TARGETS == theirs.TRANSFORMERS_MODELS_TO_FOURIERFT_TARGET_MODULES_MAPPING


def test_half_precision_base_keeps_a_float32_adapter():
    check.check_half_precision(FourierFTConfig(target_modules=["0"], n_frequency=20, scaling=5))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "n_frequency=1000 is more than '.*query' has places for, which is 256"),
        ({"n_frequency": 0}, "n_frequency must be a positive integer, not 0"),
        (
            {"n_frequency_pattern": {"query": 1.5}},
            r"n_frequency_pattern\['query'\] must be a positive integer",
        ),
        ({"scaling": "150"}, "scaling must be a number, not '150'"),
        ({"random_loc_seed": None}, "random_loc_seed must be an integer, 0 or more, not None"),
        ({"bias": "fourierft_only"}, "did you mean 'fourier_only'"),
        ({"n_frequency": 5, "target_modules": ["words"]}, "FourierFT can't wrap the cell 'words'"),
        ({"n_frequency": 5, "layers_pattern": "layer"}, "layers_pattern needs layers_to_transform"),
    ],
)
def test_mistakes(twins, options, message):
    with pytest.raises(InputError, match=message):
        get_peft_model(twins.make_model(), FourierFTConfig(**options))


def test_larger_weights_than_torch_shuffles_alike_are_refused(monkeypatch):
    monkeypatch.setattr(fourierft, "MOST_PLACES", 60)
    with pytest.raises(
        InputError, match="FourierFT can't wrap '0': it has 64 weights, which must be under 60"
    ):
        get_peft_model(
            nn.SequentialCell(nn.Dense(8, 8)), FourierFTConfig(target_modules=["0"], n_frequency=5)
        )
