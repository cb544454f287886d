"""Frequencies of every scaling against transformers'; tables of angles."""

from __future__ import annotations

import mindspore as ms
import numpy as np
import pytest
import torch
import transformers
from mindspore import Tensor
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from mindpeft.errors import InputError
from mindpeft.nn.rotary import SCALINGS, RotarySpec, RotaryTables, plain_frequencies

PAIRS = 8
SETTINGS = {
    "linear": {"factor": 3.0},
    "dynamic": {"factor": 2.0},
    "llama3": {
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    },
    "yarn": {"factor": 4.0, "original_max_position_embeddings": 32},
    "yarn without rounding": {"factor": 4.0, "original_max_position_embeddings": 32, "truncate": False},
    "yarn of DeepSeek": {
        "factor": 40.0,
        "original_max_position_embeddings": 32,
        "mscale": 1.0,
        "mscale_all_dim": 0.7,
        "beta_fast": 16,
        "beta_slow": 2,
    },
    "longrope": {
        "factor": 4.0,
        "original_max_position_embeddings": 32,
        "short_factor": [1.0 + 0.1 * i for i in range(PAIRS)],
        "long_factor": [2.0 + 0.3 * i for i in range(PAIRS)],
    },
}


def spec_of(name: str, **changes) -> RotarySpec:
    kind = name.partition(" ")[0]
    return RotarySpec(2 * PAIRS, 10000.0, 128, kind, {**SETTINGS.get(name, {}), **changes})


@pytest.mark.parametrize("name", SETTINGS)
def test_frequencies_are_those_of_transformers(name):
    kind = name.partition(" ")[0]
    config = transformers.LlamaConfig(
        hidden_size=4 * PAIRS,
        num_attention_heads=2,
        max_position_embeddings=128,
        rope_parameters={"rope_type": kind, "rope_theta": 10000.0, **SETTINGS[name]},
    )
    expected, factor = ROPE_INIT_FUNCTIONS[kind](config, torch.device("cpu"), seq_len=16)
    frequencies, weight = SCALINGS[kind](spec_of(name))
    np.testing.assert_allclose(frequencies, expected.numpy(), rtol=2e-6)
    assert weight == pytest.approx(factor, rel=1e-6)


def test_tables():
    tables = RotaryTables(spec_of("default"), 3, 2)
    tables.heads = (3, 2)
    positions = np.array([[0, 1, 2, 7], [5, 0, 0, 90]], np.int32)
    cos, sin, key_cos, key_sin = tables(Tensor(positions), ms.float32)
    angles = positions[..., None] * plain_frequencies(spec_of("default")).astype(np.float64)
    assert cos.shape == sin.shape == (2, 3, 4, 2 * PAIRS)
    assert key_cos.shape == key_sin.shape == (2, 2, 4, 2 * PAIRS)
    for head in range(3):
        np.testing.assert_allclose(cos.asnumpy()[:, head, :, :PAIRS], np.cos(angles), atol=1e-5)
        np.testing.assert_allclose(sin.asnumpy()[:, head, :, PAIRS:], np.sin(angles), atol=1e-5)
        np.testing.assert_allclose(sin.asnumpy()[:, head, :, :PAIRS], -np.sin(angles), atol=1e-5)


BAD = {
    "odd": (lambda: RotarySpec(7, 1e4, 64), "a head has 7 to turn"),
    "unknown": (lambda: RotarySpec(8, 1e4, 64, "yarm"), "did you mean 'yarn'"),
    "no factor": (lambda: SCALINGS["linear"](spec_of("linear", factor=None)), "needs a positive factor"),
    "negative": (lambda: SCALINGS["llama3"](spec_of("llama3", factor=-1)), "needs a positive factor, not -1"),
    "too few": (
        lambda: SCALINGS["longrope"](spec_of("longrope", short_factor=[1.0])),
        "needs short_factor with 8 numbers",
    ),
}


@pytest.mark.parametrize(("make", "message"), BAD.values(), ids=BAD)
def test_malformed(make, message):
    with pytest.raises(InputError, match=message):
        make()
