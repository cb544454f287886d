"""Bottleneck adapters beyond tests/parity/test_adapterhub.py: stacks, switching, presets, initial values."""

from __future__ import annotations

import json

import mindspore as ms
import numpy as np
import pytest
from mindspore import Tensor
from safetensors.numpy import load_file

import mindpeft
from mindpeft import BottleneckConfig, DoubleSeqBnConfig, LoraConfig, PeftModel, SeqBnConfig, get_peft_model
from mindpeft.config import PeftConfig
from mindpeft.errors import InputError
from mindpeft.recipe import recipe_from_dict
from tests.selection import default
from tests.tuners.adapterhub import (
    DATA,
    EXPECTED,
    fresh,
    logits,
    make_base,
    opened,
    randomised,
)

pytestmark = pytest.mark.usefixtures("graph_mode")


@pytest.mark.parametrize("name", ["norms", "parallel_norms", "parallel_gated", "no_norm"])
def test_pynative_mode(tmp_path, name):
    ms.set_context(mode=ms.PYNATIVE_MODE)
    np.testing.assert_allclose(logits(opened(tmp_path, name)), EXPECTED[f"{name}/logits"], atol=1e-5)


@pytest.mark.parametrize(
    ("stack", "names"),
    [
        ("stack", ("seq_bn", "double_seq_bn")),
        ("stack_parallel_last", ("seq_bn", "par_bn")),
        ("stack_language", ("invertible", "seq_bn")),
        ("stack_languages", ("double_invertible", "invertible")),
        ("stack_mixed", ("par_bn", "adapter_plus", "per_layer")),
    ],
)
def test_active_adapters_act_as_the_librarys_stack(tmp_path, stack, names):
    model = opened(tmp_path, *names)
    np.testing.assert_allclose(logits(model), EXPECTED[f"{stack}/logits"], atol=1e-5)
    before = len(model.compile_cache)
    for name in names:  # each alone, while the slots of the others stand by
        model.set_adapter(name)
        np.testing.assert_allclose(logits(model), EXPECTED[f"{name}/logits"], atol=1e-5)
    model.set_adapter(list(names))
    np.testing.assert_allclose(logits(model), EXPECTED[f"{stack}/logits"], atol=1e-5)
    assert len(model.compile_cache) == before == 1


@pytest.mark.parametrize(
    "name",
    default(
        ("seq_bn", "par_bn", "adapter_plus", "norms", "parallel_norms", "gated", "invertible"),
        "adapter_plus",
        "invertible",
    ),
)
def test_switched_off_it_is_the_base_model(tmp_path, name):
    expected = logits(make_base())
    model = opened(tmp_path, name)
    adapted = logits(model)
    rounding = 1e-6 if name == "gated" else 0  # a gate reads all tokens, so the last layer computes more
    with model.disable_adapter():
        np.testing.assert_allclose(logits(model), expected, rtol=0, atol=rounding)
    np.testing.assert_array_equal(logits(model), adapted)
    assert len(model.compile_cache) == 1
    np.testing.assert_array_equal(logits(model.unload()), expected)


def test_switching_between_adapters_of_any_layout_compiles_nothing(tmp_path):
    model = opened(tmp_path, "seq_bn")
    model.add_adapter("other", SeqBnConfig())
    model.load_adapter(_imported(tmp_path, "norms"), "norms")
    logits(model)
    before = len(model.compile_cache)
    for name in ("norms", "other", "seq_bn", "norms"):
        model.set_adapter(name)
        found = logits(model)
    assert len(model.compile_cache) == before == 1
    np.testing.assert_allclose(found, EXPECTED["norms/logits"], atol=1e-5)


def _imported(folder, name):
    opened(folder, name)
    return folder / name


@pytest.mark.parametrize("config", [SeqBnConfig(use_gating=True), mindpeft.ParBnConfig(task_type="SEQ_CLS")])
def test_our_own_folder_opens_again(tmp_path, config):
    model = randomised(fresh(config))
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(make_base(), tmp_path)
    np.testing.assert_array_equal(logits(again), logits(model))
    written = json.loads((tmp_path / "adapter_config.json").read_text())
    assert written["peft_type"] == "BOTTLENECK"
    assert PeftConfig.from_pretrained(tmp_path).to_dict() == written
    names = load_file(tmp_path / "adapter_model.safetensors").keys()
    assert "base_model.model.bert.encoder.layer.1.output.adapter_down.weight" in names
    assert ("base_model.model.classifier.weight" in names) == (config.task_type is not None)


def test_hybrid_with_lora_on_the_projection_inside(tmp_path):
    """The bottleneck sees what LoRA makes of the dense projection, in whichever order they came."""
    lora = LoraConfig(target_modules=["output.dense"], r=2, init_lora_weights=False)
    for configs in ([DoubleSeqBnConfig(), lora], [lora, DoubleSeqBnConfig()]):
        ms.set_seed(2)
        model = randomised(get_peft_model(make_base(), configs).set_train(False))
        adapted = logits(model)
        update, base = {}, make_base()
        values = {parameter.name: parameter.asnumpy() for parameter in model.trainable_params()}
        for name, place in base.parameters_and_names():
            stem = name.removesuffix("weight")
            if f"{stem}lora_A.weight" in values:
                product = values.pop(f"{stem}lora_B.weight") @ values.pop(f"{stem}lora_A.weight")
                update[name] = place.asnumpy() + lora.lora_alpha / lora.r * product
        assert len(update) == 4
        for name, parameter in base.parameters_and_names():
            if name in update:
                parameter.set_data(Tensor(update[name]))
        merged = get_peft_model(base, DoubleSeqBnConfig()).set_train(False)
        for parameter in merged.trainable_params():
            parameter.set_data(Tensor(values[parameter.name]))
        np.testing.assert_allclose(logits(merged), adapted, atol=1e-5)


def test_half_precision_base_keeps_a_float32_adapter(tmp_path):
    model = opened(tmp_path, "norms", dtype="float16")
    assert {str(parameter.dtype) for parameter in model.trainable_params()} == {"Float32"}
    np.testing.assert_allclose(logits(model).astype(np.float32), EXPECTED["norms/logits"], atol=2e-2)


@pytest.mark.parametrize(
    ("kind", "spread"),
    [
        ("bert", {"down": 0.02, "up": 0.02, "gate": 0.02}),
        ("mam_adapter", {"down": 48**-0.5 / 3**0.5, "up": 0.0, "gate": 0.02}),
        ("houlsby", {"down": 0.0088, "up": 0.0088, "gate": 48**-0.5 / 3**0.5}),  # 0.88: the ends are cut off
    ],
)
def test_initial_values(kind, spread):
    model = fresh(
        DoubleSeqBnConfig(
            init_weights=kind, reduction_factor=2, use_gating=True, ln_after=True, scaling="learned"
        )
    )
    values = {parameter.name.split("output.")[-1]: [] for parameter in model.trainable_params()}
    for parameter in model.trainable_params():
        values[parameter.name.split("output.")[-1]].append(parameter.asnumpy().ravel())
    values = {name: np.concatenate(parts) for name, parts in values.items()}
    for name in ("adapter_down", "adapter_up", "gate"):
        expected = spread[name.removeprefix("adapter_")]
        assert values[f"{name}.weight"].std() == pytest.approx(expected, rel=0.1), name
    assert (values["adapter_scaling"] == 1).all()
    assert (values["adapter_norm_after.weight"] == 1).all()
    assert (values["adapter_down.bias"] == 0).all()
    if kind == "houlsby":
        assert np.abs(values["adapter_down.weight"]).max() <= 0.02
        assert values["adapter_down.weight"].all()
        assert 0 < np.abs(values["gate.bias"]).max() <= 48**-0.5


def test_one_seed_for_all_adapters():
    model = fresh(SeqBnConfig(init_weights_seed=7))
    first, second = (p.asnumpy() for p in model.trainable_params() if p.name.endswith("down.weight"))
    np.testing.assert_array_equal(first, second)
    first, second = (
        p.asnumpy() for p in fresh(SeqBnConfig()).trainable_params() if p.name.endswith("down.weight")
    )
    assert (first != second).any()


def test_a_parallel_adapter_begins_as_nothing():
    np.testing.assert_array_equal(logits(fresh(mindpeft.ParBnConfig())), logits(make_base()))


@pytest.mark.parametrize("rates", [{"dropout": 0.5}, {"stochastic_depth": 0.5}])
def test_dropout_acts_while_training_only(rates):
    plain, model = (randomised(fresh(DoubleSeqBnConfig(**keys))) for keys in ({}, rates))
    np.testing.assert_array_equal(logits(model), logits(plain))
    model.set_train(True)
    found = [logits(model) for _ in range(20)]
    assert any(not np.array_equal(found[0], other) for other in found)


def test_stochastic_depth_takes_whole_rows(tmp_path):
    """With the last layer's adapter alone, each row is either the base model's or has a doubled update."""
    model = randomised(fresh(SeqBnConfig(leave_out=[0], stochastic_depth=0.5)))
    doubled = fresh(SeqBnConfig(leave_out=[0], scaling=2.0))
    for mine, other in zip(model.trainable_params(), doubled.trainable_params(), strict=True):
        other.set_data(mine.value())
    choices = logits(make_base_with_norm_twice()), logits(doubled)
    model.set_train(True)
    seen = set()
    for _ in range(12):
        for row, answer in enumerate(logits(model)):
            near = [np.allclose(answer, choice[row], atol=1e-5) for choice in choices]
            assert sum(near) == 1
            seen.add(near.index(True))
    assert seen == {0, 1}


def make_base_with_norm_twice():
    """The base as an adapter without update leaves it."""
    model = fresh(SeqBnConfig(leave_out=[0]))
    for parameter in model.trainable_params():
        parameter.set_data(Tensor(np.zeros(parameter.shape, np.float32)))
    return model


@pytest.mark.parametrize(
    ("preset", "case", "keys"),
    [
        ("seq_bn", "seq_bn", {}),
        ("pfeiffer", "seq_bn", {}),
        ("double_seq_bn", "double_seq_bn", {"reduction_factor": 8}),
        ("houlsby", "double_seq_bn", {"reduction_factor": 8}),
        ("pfeiffer+inv", "invertible", {"non_linearity": "gelu", "inv_adapter_reduction_factor": 3}),
        ("houlsby+inv", "double_invertible", {"inv_adapter_reduction_factor": 8}),
        ("par_bn", "par_bn", {"reduction_factor": 4}),
        ("scaled_parallel", "scaled_par_bn", {"reduction_factor": 8}),
        ("adapter_plus", "adapter_plus", {"stochastic_depth": 0.0}),
        ("compacter", "compacter", {"reduction_factor": 4}),
        ("compacter++", "compacter_plus_plus", {"reduction_factor": 6, "phm_bias": False}),
        ("houlsby", "per_layer", {"reduction_factor": {1: 24, "default": 12}, "non_linearity": "leakyrelu",
                                  "original_ln_before": True}),
    ],
)  # fmt: skip
def test_presets_are_the_librarys(preset, case, keys):
    recipe = recipe_from_dict(
        {
            "model": {"path": "m"},
            "data": {"train": "t.csv"},
            "peft": {"method": "bottleneck", "preset": preset, **keys},
        }
    )
    config = recipe.peft_configs()[0]
    theirs = json.loads((DATA / case / "adapter_config.json").read_text())["config"]
    assert {key: value for key, value in config.to_dict().items() if key in theirs} == theirs
    assert config.task_type == "SEQ_CLS"
    assert config.modules_to_save == ["classifier", "score"]


def test_an_unknown_preset_is_refused():
    values = {"model": {"path": "m"}, "data": {"train": "t.csv"}}
    with pytest.raises(InputError, match=r"peft.preset must be one of .*did you mean 'pfeiffer'"):
        recipe_from_dict({**values, "peft": {"method": "bottleneck", "preset": "pfeifer"}})
    with pytest.raises(InputError, match=r"unknown key 'peft\.preset'"):
        recipe_from_dict({**values, "peft": {"method": "lora", "preset": "seq_bn"}})


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"inv_adapter": "glow"}, "inv_adapter must be one of nice, not 'glow'"),
        ({"inv_adapter": "nice"}, "inv_adapter_reduction_factor must be a number, not None"),
        ({"inv_adapter_reduction_factor": 2}, "inv_adapter_reduction_factor needs inv_adapter"),
        ({"inv_adapter": "nice", "inv_adapter_reduction_factor": 25}, "leaves nothing of the 24 features"),
        ({"cross_adapter": True}, "cross_adapter is not supported"),
        ({"output_adapter": False}, "there would be no adapter"),
        ({"ln_after": "yes"}, "ln_after must be true or false, not 'yes'"),
        ({"reduction_factor": 0}, "reduction_factor must be greater than 0"),
        ({"reduction_factor": {"first": 2}}, "maps layer indices or \"default\", not 'first'"),
        ({"reduction_factor": {"1": -1}}, r"reduction_factor\['1'\] must be greater than 0"),
        ({"non_linearity": "rellu"}, "non_linearity must be one of .* did you mean 'relu'"),
        ({"init_weights": "brt"}, "init_weights must be one of .* did you mean 'bert'"),
        ({"scaling": 0}, "scaling must be .* a number that is not 0"),
        ({"scaling": "learn"}, "scaling must be one of learned, channel, a number.* did you mean 'learned'"),
        ({"dropout": 1.0}, r"dropout must lie in \[0, 1\)"),
        ({"residual_before_ln": "post"}, "residual_before_ln must be one of True, False, post_add"),
        ({"residual_before_ln": "post_add", "original_ln_before": False}, "needs original_ln_before"),
        ({"is_parallel": True, "stochastic_depth": 0.1}, "stochastic_depth is for sequential adapters"),
        ({"leave_out": [-1]}, "leave_out's entries must be an integer, 0 or more"),
        ({"init_weights_seed": 1.5}, "init_weights_seed must be an integer"),
        ({"leave_out": [0, 2]}, "leave_out names layer 2; the model has layers 0 to 1"),
        ({"leave_out": [0, 1]}, "leaves no layer with an adapter"),
        ({"reduction_factor": {"0": 4}}, 'no entry for layer 1; add it, or one for "default"'),
        ({"reduction_factor": {"5": 4, "default": 2}}, "reduction_factor names layer 5"),
    ],
)  # fmt: skip
def test_bad_configs_are_refused(keys, message):
    base = make_base()
    with pytest.raises(InputError, match=message):
        get_peft_model(base, BottleneckConfig(**keys))
    assert not any("adapter" in parameter.name for parameter in base.get_parameters())


def test_refuses_models_and_merges(twins, tmp_path):
    with pytest.raises(InputError, match="children dense, dropout and LayerNorm"):
        get_peft_model(twins.make_model(), BottleneckConfig())
    with pytest.raises(InputError, match="BOTTLENECK can't be merged"):
        opened(tmp_path, "seq_bn").merge_adapter()
