"""LoftQ: PEFT's quantised weights and factors, and what becomes of the base model's weights."""

from __future__ import annotations

from pathlib import Path

import mindspore as ms
import numpy as np
import peft
import peft.tuners.lora.layer as lora_layer
import pytest
import torch
from safetensors.numpy import load_file

from mindpeft import LoftQConfig, LoraConfig, PeftModel, get_peft_model
from mindpeft.errors import InputError
from mindpeft.tuners.loftq import has_rows, levels, loftq, quantised
from tests.tuners.against_peft import randomise
from tests.tuners.test_lora_init import assert_same, weights

# scripts/loftq_oracle.py: bits, rank, iterations
STORED = {"two": (2, 3, 1), "four": (4, 3, 1), "again": (4, 4, 4), "eight": (8, 2, 1)}
OPTIONS = {
    "target_modules": ["query", "value", "output.dense"],
    "r": 4,
    "lora_alpha": 4,
    "init_lora_weights": "loftq",
    "loftq_config": {"loftq_bits": 4, "loftq_iter": 2},
}


@pytest.fixture(autouse=True)
def without_a_graph():
    ms.set_context(mode=ms.PYNATIVE_MODE)
    yield
    ms.set_context(mode=ms.GRAPH_MODE)


@pytest.fixture(scope="module")
def stored():
    return load_file(Path(__file__).parent / "data" / "loftq.safetensors")


@pytest.fixture
def quantiser_for_peft(monkeypatch):
    """PEFT's own needs a GPU; what it does with the result is tested."""

    def init(weight, num_bits, reduced_rank, num_iter):
        values, pair = loftq(weight.detach().numpy(), reduced_rank, num_bits, num_iter, rows=True)
        return tuple(torch.tensor(value) for value in (values, *pair))

    monkeypatch.setattr(lora_layer, "loftq_init", init)


@pytest.mark.parametrize("name", STORED)
def test_values_and_factors_are_pefts(stored, name):
    bits, rank, iterations = STORED[name]
    values, (a, b) = loftq(stored["weight"], rank, bits, iterations, rows=False)
    np.testing.assert_allclose(values, stored[f"{name}.values"], atol=1e-6)
    np.testing.assert_allclose(b @ a, stored[f"{name}.product"], atol=2e-6)
    assert a.shape == (rank, 16)
    assert b.shape == (24, rank)


def test_the_levels_of_four_bits():
    """NF4's, as its paper and bitsandbytes list them."""
    listed = [-1.0, -0.6961928, -0.52507305, -0.3949175, -0.28444138, -0.18477343, -0.09105004, 0.0]
    listed += [0.0795803, 0.1609302, 0.2461123, 0.33791524, 0.44070983, 0.562617, 0.72295684, 1.0]
    np.testing.assert_allclose(levels(4), listed, atol=1e-6)
    assert len(levels(2)) == 4
    assert len(levels(8)) == 256


def test_eight_bits_by_rows(stored):
    """The nearest of 255 multiples in each row; zeros and odd sizes do, too."""
    weight = stored["weight"].copy()
    weight[3] = 0
    found = quantised(weight, 8, rows=True)
    step = np.abs(weight).max(1, keepdims=True) / 127
    assert (np.abs(found - weight) <= 0.51 * step + 1e-3 * np.abs(weight)).all()
    codes = found / np.where(step > 0, step, 1)
    np.testing.assert_allclose(codes, np.rint(codes), atol=0.1)  # the weights were rounded to half precision
    assert not found[3].any()
    for bits in (2, 4, 8):
        assert np.isfinite(quantised(weight[:5, :7], bits, rows=False)).all()
    assert [has_rows(version) for version in ("0.18.1", "0.9.0", "0.19.0", "0.21.2", None)] == [0, 0, 1, 1, 1]


def test_a_fresh_adapter_and_its_file(twins, tmp_path, quantiser_for_peft):
    """The weights are the quantised ones, the model is nearer to the whole one; PEFT makes the same of it."""
    ours = get_peft_model(twins.make_model(), LoraConfig(**OPTIONS))
    whole, found = weights(twins.make_model()), weights(ours)
    changed = [key for key, value in found.items() if not np.array_equal(value, whole[key])]
    assert sorted(changed) == sorted(f"{path}.weight" for path in ours.targeted_module_names)
    theirs = peft.PeftModel(twins.make_torch(), peft.LoraConfig(**OPTIONS)).eval()
    np.testing.assert_allclose(twins.logits(ours), twins.torch_logits(theirs), atol=1e-5)
    for path in ours.targeted_module_names:
        expected = theirs.get_base_model().get_submodule(path).base_layer.weight.detach().numpy()
        np.testing.assert_allclose(found[f"{path}.weight"], expected, atol=1e-6)
    randomise(ours)
    expected = twins.logits(ours)
    ours.save_pretrained(tmp_path / "ours")
    again = PeftModel.from_pretrained(twins.make_model(), tmp_path / "ours")
    assert_same(weights(again), found)
    np.testing.assert_allclose(twins.logits(again), expected, atol=1e-6)
    read = peft.PeftModel.from_pretrained(twins.make_torch(), tmp_path / "ours").eval()
    np.testing.assert_allclose(twins.torch_logits(read), expected, atol=1e-5)
    read.save_pretrained(tmp_path / "theirs")
    back = PeftModel.from_pretrained(twins.make_model(), tmp_path / "theirs")
    assert back.peft_config["default"].loftq_config == LoftQConfig(4, 2)
    np.testing.assert_allclose(twins.logits(back), expected, atol=1e-5)


def test_the_base_model_comes_back_bit_for_bit(twins):
    expected = weights(twins.make_model())
    model = get_peft_model(twins.make_model(), LoraConfig(**OPTIONS))
    split, answer = weights(model), twins.logits(model)
    with model.disable_adapter():
        assert_same(weights(model), expected)
    assert_same(weights(model), split)
    model.add_adapter("plain", LoraConfig(target_modules=["query"]))
    model.set_adapter("plain")
    assert_same(weights(model), expected)
    model.set_adapter("default")
    model.merge_adapter()
    np.testing.assert_allclose(twins.logits(model), answer, atol=1e-5)
    model.unmerge_adapter()
    assert_same(weights(model), split)
    assert_same(weights(model.unload()), expected)


def test_merged_for_good(twins):
    model = get_peft_model(twins.make_model(), LoraConfig(**OPTIONS))
    answer = twins.logits(model)
    np.testing.assert_allclose(twins.logits(model.merge_and_unload()), answer, atol=1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"loftq_config": {}}, 'init_lora_weights="loftq" needs loftq_config'),
        ({"loftq_config": {"loftq_bits": 3}}, "loftq_config.loftq_bits must be one of 2, 4, 8, not 3"),
        ({"loftq_config": {"loftq_iter": 0}}, "loftq_config.loftq_iter must be a positive integer"),
        ({"loftq_config": {"bits": 4}}, "loftq_config has an unknown key 'bits'"),
        ({"init_lora_weights": True}, "loftq_config="),
        ({"use_dora": True}, "and use_dora can't be used together"),
        ({"r": 17}, "needs a rank of at most 16"),
        ({"target_modules": ["c_attn"]}, r"'c_attn', whose weight is \(in, out\)"),
        ({"target_modules": ["words"]}, "not possible for the embedding 'words'"),
    ],
)
def test_refuses(twins, options, message):
    base = twins.make_model()
    with pytest.raises(InputError, match=message):
        get_peft_model(base, LoraConfig(**{**OPTIONS, **options}))
    assert_same(weights(base), weights(twins.make_model()))


def test_says_what_it_can_not_do(twins, tmp_path, caplog):
    model = get_peft_model(twins.make_model(), LoraConfig(**{**OPTIONS, "lora_alpha": 8}))
    assert "LoftQ corrects the weights for a scaling of 1" in caplog.text
    with pytest.raises(InputError, match="can't be converted: what quantisation lost has no low rank"):
        model.save_pretrained(tmp_path, convert_to_lora=True)
