"""Merging, unmerging and unloading, on the twin model."""

from __future__ import annotations

import mindspore as ms
import numpy as np
import peft
import pytest
import torch
from mindspore import Tensor, nn

from mindpeft import PeftModel, get_peft_model
from mindpeft.errors import InputError
from mindpeft.parameters import base_places
from tests.random_lora import config, graphs

pytestmark = pytest.mark.usefixtures("graph_mode")


def test_merging_twenty_times_is_bit_exact(twins, three):
    weights = {name: place.read() for name, place in three._bank.base.places.items()}
    three.set_adapter("eight")
    weights = {name: place.read() for name, place in three._bank.base.places.items()}
    adapted = twins.logits(three)
    compiled = graphs(three)
    for _ in range(20):
        three.merge_adapter()
        np.testing.assert_allclose(twins.logits(three), adapted, atol=2e-6)
        three.unmerge_adapter()
        np.testing.assert_array_equal(twins.logits(three), adapted)
    assert graphs(three) == compiled
    for name, value in weights.items():
        np.testing.assert_array_equal(three._bank.base.places[name].read(), value, err_msg=name)


def test_merging_several_adapters_adds_their_deltas(twins, three):
    three.set_adapter("four")
    place = three._bank.base.places["encoder.layer.0.attention.self.value.weight"]
    before = place.read()
    for name in ("four", "sixteen"):
        three.merge_adapter([name])
        three.unmerge_adapter()
    deltas = []
    for names in (["four"], ["sixteen"], ["four", "sixteen"]):
        three.merge_adapter(names)
        deltas.append(place.read() - before)
        three.unmerge_adapter()
    np.testing.assert_allclose(deltas[0] + deltas[1], deltas[2], atol=1e-6)
    np.testing.assert_array_equal(place.read(), before)


def test_disabling_while_merged(twins, three):
    three.set_adapter("sixteen")
    three.merge_adapter()
    merged = twins.logits(three)
    with three.disable_adapter():
        np.testing.assert_array_equal(twins.logits(three), twins.logits(twins.make_model()))
    np.testing.assert_array_equal(twins.logits(three), merged)
    three.unmerge_adapter()
    np.testing.assert_allclose(twins.logits(three), merged, atol=2e-6)


OPTIONS = [
    {"target_modules": "all-linear"},
    {"target_modules": ["words", "query"], "use_rslora": True},
    {"target_modules": ["query"], "task_type": "SEQ_CLS", "bias": "all"},
    {"target_modules": ["query", "dense"], "lora_bias": True},
    {"target_modules": ["c_attn"]},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_merge_and_unload_keeps_the_logits(twins, options):
    model = get_peft_model(twins.make_model(), config(**options))
    for parameter in model.trainable_params():
        parameter.set_data(parameter + 0.01)
    adapted = twins.logits(model)
    bare = model.merge_and_unload(safe_merge=True)
    assert not [name for name, _ in bare.parameters_and_names() if "lora" in name or "base_layer" in name]
    np.testing.assert_allclose(twins.logits(bare), adapted, atol=5e-6)
    again = get_peft_model(bare, config())
    assert again.trainable_params()


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_unload_gives_the_base_back(twins, options):
    base = twins.make_model()
    weights = {p.name: p.asnumpy().copy() for p in base.get_parameters()}
    model = get_peft_model(base, config(**options))
    for parameter in model.trainable_params():
        parameter.set_data(parameter + 0.1)
    model.merge_adapter()
    bare = model.unload()
    assert bare is base
    assert {p.name for p in bare.get_parameters()} == weights.keys()
    for parameter in bare.get_parameters():
        np.testing.assert_array_equal(parameter.asnumpy(), weights[parameter.name])
    np.testing.assert_array_equal(twins.logits(bare), twins.logits(twins.make_model()))


def test_merged_weights_equal_pefts(twins, tmp_path):
    torch.manual_seed(0)
    options = {"target_modules": ["words", "query", "dense"], "init_lora_weights": False, "use_rslora": True}
    theirs = peft.get_peft_model(twins.make_torch(), peft.LoraConfig(**options))
    theirs.save_pretrained(tmp_path)
    state = theirs.merge_and_unload().state_dict()
    bare = PeftModel.from_pretrained(twins.make_model(), tmp_path).merge_and_unload()
    for name, place in base_places(bare).items():
        np.testing.assert_allclose(place.read(), state[name].numpy(), atol=1e-5, err_msg=name)


def test_half_precision_merge_rounds_once():
    dense = nn.Dense(8, 8, has_bias=False, dtype=ms.float16)
    model = get_peft_model(nn.SequentialCell(dense), config(target_modules=["0"], r=2))
    before = dense.weight.asnumpy().copy()
    a, b = (p.asnumpy() for p in model.trainable_params())
    model.merge_adapter()
    np.testing.assert_array_equal(
        dense.weight.asnumpy(), (before.astype(np.float32) + 4 * (b @ a)).astype(np.float16)
    )
    model.unmerge_adapter()
    np.testing.assert_array_equal(dense.weight.asnumpy(), before)


def test_safe_merge_refuses_before_touching_anything(twins):
    model = get_peft_model(twins.make_model(), config())
    parameter = model.trainable_params()[-1]
    parameter.set_data(Tensor(np.full(parameter.shape, np.inf, np.float32)))
    weights = {p.name: p.asnumpy().copy() for p in model.get_parameters()}
    with pytest.raises(
        InputError, match=r"values that are not finite at 'encoder\.layer\.2\.attention\.self\.value\.weight'"
    ):
        model.merge_adapter(safe_merge=True)
    for parameter in model.get_parameters():
        np.testing.assert_array_equal(parameter.asnumpy(), weights[parameter.name])


def test_saving_while_merged_or_disabled_writes_the_adapter(twins, tmp_path):
    model = get_peft_model(twins.make_model(), config(lora_bias=True, bias="lora_only"))
    adapted = twins.logits(model)
    model.merge_adapter()
    model.save_pretrained(tmp_path / "merged")
    model.unmerge_adapter()
    with model.disable_adapter():
        model.save_pretrained(tmp_path / "disabled")
    for folder in ("merged", "disabled"):
        again = PeftModel.from_pretrained(twins.make_model(), tmp_path / folder)
        np.testing.assert_allclose(twins.logits(again), adapted, atol=1e-6)


def test_nothing_may_change_while_merged_or_disabled(three):
    three.merge_adapter()
    for act in (
        lambda: three.set_adapter("eight"),
        lambda: three.delete_adapter("eight"),
        lambda: three.add_adapter("n", config()),
        lambda: three.merge_adapter(),
    ):
        with pytest.raises(InputError, match="while four is merged; call unmerge_adapter\\(\\) first"):
            act()
    three.unmerge_adapter()
    with three.disable_adapter(), pytest.raises(InputError, match="inside disable_adapter"):
        three.set_adapter("eight")
    three.set_adapter("eight")
