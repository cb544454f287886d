"""DoRA beyond what tests/tuners/test_lora.py compares: the off switch, merging, dropout, several adapters."""

from __future__ import annotations

import mindspore as ms
import numpy as np
import peft
import pytest
import torch
from mindspore import Tensor

from mindpeft import LoraConfig, get_peft_model

pytestmark = pytest.mark.usefixtures("graph_mode")

EVERYWHERE = ["query", "intermediate", "words", "kinds", "c_attn"]


def dora(**options):
    """A config whose adapter acts from the start."""
    return LoraConfig(
        **{"use_dora": True, "init_lora_weights": False, "target_modules": EVERYWHERE, "r": 4} | options
    )


def randomise(model):
    random = np.random.default_rng(1)
    for parameter in model.trainable_params():
        noise = random.normal(0, 0.1, parameter.shape).astype(np.float32)
        parameter.set_data(Tensor(parameter.asnumpy() + noise))


def gradients(twins, model):
    def loss(ids, labels):
        return model(ids, labels)[0]

    parameters = model.trainable_params()
    _, found = ms.value_and_grad(loss, None, parameters)(Tensor(twins.IDS), Tensor([0, 2, 1, 1], ms.int32))
    return dict(zip((p.name for p in parameters), found, strict=True))


@pytest.mark.parametrize("mode", [ms.GRAPH_MODE, ms.PYNATIVE_MODE])
def test_off_is_the_base_bit_for_bit(twins, mode):
    ms.set_context(mode=mode)
    expected = twins.logits(twins.make_model())
    model = get_peft_model(twins.make_model(), dora())
    randomise(model)
    adapted = twins.logits(model)
    assert np.abs(adapted - expected).max() > 0.1
    with model.disable_adapter():
        np.testing.assert_array_equal(twins.logits(model), expected)
    np.testing.assert_array_equal(twins.logits(model), adapted)


def test_a_fresh_adapter_changes_next_to_nothing(twins):
    model = get_peft_model(twins.make_model(), dora(init_lora_weights=True))
    np.testing.assert_allclose(twins.logits(model), twins.logits(twins.make_model()), atol=1e-6)


def test_a_slot_that_is_off_lets_gradients_through(twins):
    """A plain adapter that trains beside an empty DoRA slot gets the gradients that it has alone."""
    plain = LoraConfig(target_modules=EVERYWHERE, init_lora_weights=False, r=3)
    ms.set_seed(5)
    alone = gradients(twins, get_peft_model(twins.make_model(), plain))
    ms.set_seed(5)
    model = get_peft_model(twins.make_model(), plain)
    model.add_adapter("dora", dora())
    model.set_adapter("dora")
    assert all(np.isfinite(value.asnumpy()).all() for value in gradients(twins, model).values())
    model.set_adapter("default")
    found = gradients(twins, model)
    for name, value in alone.items():
        np.testing.assert_allclose(found[name].asnumpy(), value.asnumpy(), atol=1e-6, err_msg=name)


def test_rows_of_zeros_give_no_nan(twins):
    base = twins.make_model()
    weight = base.encoder.layer[0].attention.self.query.weight
    weight.set_data(Tensor(np.zeros(weight.shape, np.float32)))
    model = get_peft_model(base, dora(target_modules=["query"], init_lora_weights=True))
    assert np.isfinite(twins.logits(model)).all()
    assert all(np.isfinite(value.asnumpy()).all() for value in gradients(twins, model).values())
    model.merge_adapter(safe_merge=True)


def test_merging_is_exact_and_taken_back_bit_for_bit(twins, tmp_path):
    model = get_peft_model(twins.make_model(), dora())
    randomise(model)
    model.save_pretrained(tmp_path)
    before = {p.name: p.asnumpy().copy() for p in model.get_parameters()}
    adapted = twins.logits(model)
    for _ in range(20):
        model.merge_adapter()
        merged = twins.logits(model)
        model.unmerge_adapter()
    np.testing.assert_allclose(merged, adapted, atol=1e-5)
    for parameter in model.get_parameters():
        np.testing.assert_array_equal(parameter.asnumpy(), before[parameter.name])
    theirs = peft.PeftModel(twins.make_torch(), peft.PeftConfig.from_pretrained(tmp_path))
    theirs.load_adapter(tmp_path, "default")
    merged = model.merge_and_unload()
    state = theirs.merge_and_unload().state_dict()
    for name in ("c_attn.weight", "encoder.layer.1.intermediate.weight"):
        own = dict(zip((p.name for p in merged.get_parameters()), merged.get_parameters(), strict=True))[name]
        np.testing.assert_allclose(own.asnumpy(), state[name].numpy(), atol=2e-6)


def test_merging_two_adapters_takes_each_norm_from_the_original_weight(twins):
    torch.manual_seed(0)
    options = {"target_modules": ["query", "c_attn"], "init_lora_weights": False, "r": 2, "use_dora": True}
    theirs = peft.PeftModel(twins.make_torch(), peft.LoraConfig(**options))
    theirs.add_adapter("second", peft.LoraConfig(**options))
    ours = get_peft_model(twins.make_model(), LoraConfig(**options))
    ours.add_adapter("second", LoraConfig(**options))
    for name in ("default", "second"):
        ours.set_adapter(name)
        randomise(ours)
        state = {p.name: torch.tensor(p.asnumpy()) for p in ours.trainable_params()}
        peft.set_peft_model_state_dict(theirs, {f"base_model.model.{k}": v for k, v in state.items()}, name)
    theirs.merge_adapter(["default", "second"])
    ours.merge_adapter(["default", "second"])
    # PEFT gets the original weight back by unmerging, to within rounding.
    np.testing.assert_allclose(twins.logits(ours), twins.torch_logits(theirs.eval()), atol=1e-4)


@pytest.mark.parametrize("target", ["query", "c_attn"])
def test_dropout_is_on_the_base_product_too(twins, target):
    """With A and B zero, y = W x + b + (m / |W| - 1) W drop(x): never plain, and right in the mean."""
    model = get_peft_model(
        twins.make_model(), dora(target_modules=[target], lora_dropout=0.5, init_lora_weights=True)
    )
    inner = model.base_model
    layer = inner.c_attn if target == "c_attn" else inner.encoder.layer[0].attention.self.query
    layer.lora_magnitude_vector.set_data(layer.lora_magnitude_vector * 3.0)
    x = np.random.default_rng(0).normal(size=(1, 16)).astype(np.float32)
    expected = layer(Tensor(x)).asnumpy()[0]
    layer.set_train(True)
    many = layer(Tensor(np.tile(x, (20000, 1)))).asnumpy()
    assert many.std(0).min() > 0.5
    np.testing.assert_allclose(many.mean(0), expected, atol=0.1)


def test_switching_compiles_nothing(twins):
    model = get_peft_model(twins.make_model(), dora(r=2), slot_rank=4)
    model.add_adapter("other", dora(r=4, lora_alpha=3))
    first = twins.logits(model)
    count = len(model.compile_cache)
    model.set_adapter("other")
    second = twins.logits(model)
    model.set_adapter("default")
    np.testing.assert_array_equal(twins.logits(model), first)
    assert len(model.compile_cache) == count
    assert np.abs(first - second).max() > 1e-3


def test_a_half_precision_base_keeps_a_float32_adapter():
    dense = ms.nn.Dense(8, 6, dtype=ms.float16)
    model = get_peft_model(ms.nn.SequentialCell(dense), dora(target_modules=["0"], r=2))
    randomise(model)
    assert {str(p.dtype) for p in model.trainable_params()} == {"Float32"}
    x = Tensor(np.random.default_rng(0).normal(size=(3, 8)).astype(np.float16))
    y = model(x)
    assert y.dtype == ms.float16
    np.testing.assert_allclose(model.merge_and_unload()(x).asnumpy(), y.asnumpy(), atol=2e-2)
