"""Gated LoRA, gated prefixes and UniPELT's hybrid against what AdapterHub's library computed."""

from __future__ import annotations

import json

import mindspore as ms
import numpy as np
import pytest

from mindpeft import (
    GatedLoraConfig,
    HubPrefixConfig,
    PeftModel,
    PrefixTuningConfig,
    SeqBnConfig,
    get_peft_model,
)
from mindpeft.errors import InputError
from mindpeft.foreign.convert import convert_adapter
from mindpeft.recipe import recipe_from_dict
from tests.selection import default
from tests.tuners.adapterhub import DATA, EXPECTED, check_training, fresh, logits, make_base, randomised


@pytest.fixture(autouse=True)
def graph_mode():
    ms.set_context(mode=ms.GRAPH_MODE)
    yield
    ms.set_context(mode=ms.GRAPH_MODE)


def converted(folder, name):
    convert_adapter(DATA / name, folder / name)
    return PeftModel.from_pretrained(make_base(), folder / name, name, is_trainable=True).set_train(False)


@pytest.mark.parametrize("name", default(["lora_gated", "prefix_gated", "unipelt"], "unipelt"))
def test_computes_and_trains_as_the_library(tmp_path, name):
    check_training(converted(tmp_path, name), name)


@pytest.mark.parametrize("name", ["prefix", "prefix_flat", "mam"])
def test_prefixes_flat_and_made_by_an_mlp(tmp_path, name):
    ms.set_context(mode=ms.PYNATIVE_MODE)
    np.testing.assert_allclose(logits(converted(tmp_path, name)), EXPECTED[f"{name}/logits"], atol=1e-5)


def test_pynative_mode_switching_and_files(tmp_path):
    ms.set_context(mode=ms.PYNATIVE_MODE)
    base, model = logits(make_base()), converted(tmp_path, "unipelt")
    found = logits(model)
    np.testing.assert_allclose(found, EXPECTED["unipelt/logits"], atol=1e-5)
    whole = make_base()
    whole.bert.encoder.layer[-1].register_forward_hook(lambda cell, inputs, output: None)
    with model.disable_adapter():  # gates read all tokens: all of the last layer is computed, as for a hook
        np.testing.assert_array_equal(logits(model), logits(whole))
    np.testing.assert_array_equal(logits(model), found)
    model.save_pretrained(tmp_path / "again", ["unipelt"])
    again = PeftModel.from_pretrained(make_base(), tmp_path / "again" / "unipelt")
    np.testing.assert_array_equal(logits(again), found)
    with pytest.raises(InputError, match="can't be merged"):
        model.merge_adapter()
    np.testing.assert_array_equal(logits(model.unload()), base)


@pytest.mark.parametrize("projection", [False, True])
def test_a_fresh_prefix_trains_its_mlp_and_gates(tmp_path, projection):
    ms.set_context(mode=ms.PYNATIVE_MODE)
    config = HubPrefixConfig(num_virtual_tokens=3, prefix_projection=projection, use_gating=True)
    model = randomised(fresh(config))
    model.save_pretrained(tmp_path)
    names = [parameter.name for parameter in model.trainable_params()]
    assert sum("prefix_gate" in name for name in names) == 4
    assert any("prompt_encoder" in name for name in names) == projection
    again = PeftModel.from_pretrained(make_base(), tmp_path)
    np.testing.assert_allclose(logits(again), logits(model), atol=1e-6)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["peft_type"] == "HUB_PREFIX"


def test_gated_lora_begins_as_the_base_and_takes_any_rank():
    model = fresh(GatedLoraConfig(r=2, target_modules=["query", "dense"]))
    np.testing.assert_allclose(logits(model), logits(make_base()), atol=1e-6)
    first = logits(randomised(model))
    model.add_adapter("wide", GatedLoraConfig(r=5, target_modules=["query"], init_lora_weights=False))
    model.set_adapter("wide")
    assert not np.allclose(logits(model), first, atol=1e-3)
    model.set_adapter("default")
    np.testing.assert_allclose(logits(model), first, atol=1e-6)


def recipe(section):
    return recipe_from_dict({"model": {"path": "m"}, "data": {"train": "t.csv"}, "peft": section})


def test_presets_of_hybrids_are_the_librarys():
    prefix, adapter, lora = recipe({"preset": "unipelt"}).peft_configs()
    theirs = json.loads((DATA / "unipelt" / "adapter_config.json").read_text())["config"]["configs"]
    assert {**theirs[1], "reduction_factor": 16}.items() <= adapter.to_dict().items()
    assert (prefix.num_virtual_tokens, prefix.use_gating, prefix.encoder_hidden_size) == (10, True, 512)
    assert (lora.r, lora.peft_type, lora.task_type) == (8, "GATED_LORA", "SEQ_CLS")
    prefix, adapter = recipe({"preset": "mam"}).peft_configs()
    theirs = json.loads((DATA / "mam" / "adapter_config.json").read_text())["config"]["configs"]
    assert {**theirs[1], "reduction_factor": 2}.items() <= adapter.to_dict().items()
    assert (prefix.num_virtual_tokens, prefix.use_gating, prefix.encoder_hidden_size) == (30, False, 800)
    trained = {
        p.name.split(".")[-2] for p in fresh(recipe({"preset": "unipelt"}).peft_configs()).trainable_params()
    }
    assert {"lora_gate", "prefix_gate", "gate", "lora_A", "adapter_down", "classifier"} <= trained


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"preset": "unipet"}, "peft.preset must be one of mam, unipelt.*did you mean 'unipelt'"),
        ({"preset": "mam", "r": 4}, r"peft\.r can't go with the preset of a hybrid"),
    ],
)
def test_bad_presets_are_refused(section, message):
    with pytest.raises(InputError, match=message):
        recipe(section)


def test_what_can_not_be_is_refused(twins):
    gated = HubPrefixConfig(num_virtual_tokens=2, use_gating=True)
    plain = PrefixTuningConfig(num_virtual_tokens=2)
    for configs in ([gated, plain], [plain, gated], [gated, SeqBnConfig(), gated]):
        with pytest.raises(InputError, match="no prefix can go beside one with gates"):
            get_peft_model(make_base(), configs)
    with pytest.raises(InputError, match="shared_gating must be true or false"):
        HubPrefixConfig(num_virtual_tokens=2, shared_gating=3)
    with pytest.raises(InputError, match="r must be a positive integer"):
        GatedLoraConfig(r=0)
    with pytest.raises(InputError, match="GATED_LORA can't wrap"):
        get_peft_model(make_base(), GatedLoraConfig(target_modules=["word_embeddings"]))
