"""Adapters that act together: several active ones, and hybrids of several configs."""

from __future__ import annotations

import json

import numpy as np
import peft
import pytest
from mindspore import Tensor

from mindpeft import LoraConfig, PeftModel, get_peft_model
from mindpeft.errors import InputError

pytestmark = pytest.mark.usefixtures("graph_mode")


def config(**options):
    return LoraConfig(**{"r": 4, "target_modules": ["query", "value"], "init_lora_weights": False, **options})


HYBRID = [
    config(target_modules=["query", "words"], bias="lora_only"),
    config(target_modules=["query", "dense"], r=3, lora_alpha=2, modules_to_save=["classifier"]),
]


def randomised(model):
    for parameter in model.trainable_params():
        value = parameter.asnumpy()
        noise = np.random.normal(0, 0.05, parameter.shape) * (value != 0)  # a slot's spare rows stay zero
        parameter.set_data(Tensor((value + noise).astype(np.float32)))
    return model


@pytest.fixture
def pair(twins):
    """A model with two adapters, on cells of which some are the same."""
    model = get_peft_model(twins.make_model(), config(lora_alpha=4), "one")
    model.add_adapter("two", config(r=8, lora_alpha=32, target_modules=["query", "dense"]))
    return model


def alone(twins, model, *names):
    """The answers with each of these active in turn, and without any."""
    found = []
    for name in names:
        model.set_adapter(name)
        found.append(twins.logits(model))
    with model.disable_adapter():
        found.append(twins.logits(model))
    return found


def test_several_active_adapters_act_as_pefts_do(twins, pair, tmp_path):
    pair.save_pretrained(tmp_path)
    theirs = peft.PeftModel.from_pretrained(twins.make_torch(), tmp_path / "one", adapter_name="one")
    theirs.load_adapter(tmp_path / "two", "two")
    theirs.base_model.set_adapter(["one", "two"])
    pair.set_adapter(["one", "two"])
    assert pair.active_adapters == ["one", "two"]
    np.testing.assert_allclose(twins.logits(pair), twins.torch_logits(theirs), atol=1e-5)
    assert pair.get_nb_trainable_parameters() == theirs.get_nb_trainable_parameters()
    pair.set_adapter(["two", "one"])
    np.testing.assert_allclose(twins.logits(pair), twins.torch_logits(theirs), atol=1e-5)


def test_switching_between_one_and_several_compiles_once_for_each_size(twins, pair):
    first, second, base = alone(twins, pair, "one", "two")
    pair.set_adapter(["one", "two"])
    together = twins.logits(pair)
    compiled = len(pair.compile_cache)
    again = alone(twins, pair, "one", "two")
    for found, expected in zip(again, (first, second, base), strict=True):
        np.testing.assert_allclose(found, expected, atol=1e-6)
    np.testing.assert_array_equal(again[2], base)
    pair.set_adapter(["one", "two"])
    np.testing.assert_array_equal(twins.logits(pair), together)
    assert len(pair.compile_cache) == compiled


def test_several_active_adapters_train_and_keep_their_own_values(twins, pair):
    pair.set_adapter(["one", "two"])
    assert len(pair.trainable_params()) == 2 * (6 + 3 + 6)  # A and B: query, value; query, two dense cells
    randomised(pair)
    together = twins.logits(pair)
    pair.set_adapter("one")
    pair.set_adapter(["one", "two"])
    np.testing.assert_array_equal(twins.logits(pair), together)
    pair.merge_adapter()
    np.testing.assert_allclose(twins.logits(pair), together, atol=2e-6)
    pair.unmerge_adapter()
    np.testing.assert_array_equal(twins.logits(pair), together)


def test_deleting_one_of_two_active_adapters(twins, pair):
    first = alone(twins, pair, "one")[0]
    pair.set_adapter(["one", "two"])
    pair.delete_adapter("two")
    assert pair.active_adapters == ["one"]
    np.testing.assert_allclose(twins.logits(pair), first, atol=1e-6)


@pytest.mark.parametrize("names", [[], ["one", "one"], ["one", "tow"]])
def test_bad_lists_of_names(pair, names):
    with pytest.raises(InputError, match=r"each once|did you mean 'two'"):
        pair.set_adapter(names)
    assert pair.active_adapters == ["one"]


def test_a_hybrid_is_saved_part_by_part_and_opens_again(twins, tmp_path):
    model = randomised(get_peft_model(twins.make_model(), HYBRID))
    expected = twins.logits(model)
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "hybrid.json").read_text()) == {"parts": ["0-lora", "1-lora"]}
    again = PeftModel.from_pretrained(twins.make_model(), tmp_path, is_trainable=True)
    np.testing.assert_array_equal(twins.logits(again), expected)
    assert again.get_nb_trainable_parameters() == model.get_nb_trainable_parameters()
    assert [found.r for found in again.peft_config["default"]] == [4, 3]


def test_the_parts_of_a_hybrid_open_in_peft(twins, tmp_path):
    model = randomised(get_peft_model(twins.make_model(), HYBRID))
    model.save_pretrained(tmp_path)
    theirs = peft.PeftModel.from_pretrained(twins.make_torch(), tmp_path / "0-lora", adapter_name="first")
    theirs.load_adapter(tmp_path / "1-lora", "second")
    theirs.base_model.set_adapter(["first", "second"])
    theirs.get_base_model().classifier.set_adapter("second")
    np.testing.assert_allclose(twins.logits(model), twins.torch_logits(theirs), atol=1e-5)


def test_a_hybrid_merges_and_is_disabled_exactly(twins):
    base = twins.logits(twins.make_model())
    model = randomised(get_peft_model(twins.make_model(), HYBRID))
    expected = twins.logits(model)
    with model.disable_adapter():
        np.testing.assert_array_equal(twins.logits(model), base)
    np.testing.assert_array_equal(twins.logits(model), expected)
    np.testing.assert_allclose(twins.logits(model.merge_and_unload()), expected, atol=2e-6)


def test_an_empty_hybrid_is_refused(twins):
    with pytest.raises(InputError, match="at least one config"):
        get_peft_model(twins.make_model(), [])
