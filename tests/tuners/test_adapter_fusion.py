"""AdapterFusion against what AdapterHub's library computed, its files, and the rest of its protocol."""

from __future__ import annotations

import json

import mindspore as ms
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from mindpeft import AdapterFusionConfig, LoraConfig, ParBnConfig, PeftModel, SeqBnConfig, get_peft_model
from mindpeft.convert.checkpoint import open_checkpoint
from mindpeft.errors import InputError
from mindpeft.foreign.convert import convert_adapter
from mindpeft.tuners.adapterhub_files import import_adapterhub
from mindpeft.tuners.adapterhub_fusion import FUSION_WEIGHT_NAMES, export_fusion, import_fusion
from tests.selection import default
from tests.tuners.adapterhub import (
    DATA,
    EXPECTED,
    FUSIONS,
    check_training,
    fresh,
    logits,
    make_base,
    opened,
    randomised,
)


@pytest.fixture(autouse=True)
def graph_mode():
    ms.set_context(mode=ms.GRAPH_MODE)
    yield
    ms.set_context(mode=ms.GRAPH_MODE)


def opened_fusion(folder, name):
    import_fusion(DATA / FUSIONS[name], folder / name)
    return PeftModel.from_pretrained(make_base(), folder / name, name, is_trainable=True).set_train(False)


@pytest.mark.parametrize("name", default(FUSIONS, next(iter(FUSIONS))))
def test_computes_and_trains_as_the_library(tmp_path, name):
    check_training(opened_fusion(tmp_path, name), name)


def test_pynative_mode_and_behind_another_adapter(tmp_path):
    ms.set_context(mode=ms.PYNATIVE_MODE)
    model = opened_fusion(tmp_path, "fusion_dynamic")
    np.testing.assert_allclose(logits(model), EXPECTED["fusion_dynamic/logits"], atol=1e-5)
    import_adapterhub(DATA / "adapter_plus", tmp_path / "adapter_plus")
    model.load_adapter(tmp_path / "adapter_plus", "adapter_plus")
    model.set_adapter(["adapter_plus", "fusion_dynamic"])
    np.testing.assert_allclose(logits(model), EXPECTED["stack_fusion/logits"], atol=1e-5)


def test_switching_between_a_fusion_and_its_adapters(tmp_path):
    """The same slots serve adapters alone and mixed."""
    base = logits(make_base())
    model = opened(tmp_path, "seq_bn", "norms")
    model.set_adapter("seq_bn")
    model.add_fusion_adapter(["seq_bn", "norms"], "mixed")
    for _ in range(2):
        model.set_adapter("mixed")
        mixed = logits(model)
        with model.disable_adapter():
            np.testing.assert_array_equal(logits(model), base)
        np.testing.assert_array_equal(logits(model), mixed)
        for name in ("norms", "seq_bn"):
            model.set_adapter(name)
            np.testing.assert_allclose(logits(model), EXPECTED[f"{name}/logits"], atol=1e-5)
    np.testing.assert_array_equal(logits(model.unload()), base)


def test_a_fusion_of_loaded_adapters_is_that_of_the_files(tmp_path):
    model = opened(tmp_path, "gated", "par_bn")
    model.add_fusion_adapter(["gated", "par_bn"], "mixed", AdapterFusionConfig(value=False))
    model.set_adapter("mixed")
    names = {parameter.name for parameter in model.trainable_params()}
    assert names
    assert all(".adapter_fusion." in name for name in names)
    stored = opened_fusion(tmp_path, "fusion_parallel")
    values = {parameter.name: parameter.value() for parameter in stored.trainable_params()}
    for parameter in model.trainable_params():
        parameter.set_data(values[parameter.name])
    np.testing.assert_allclose(logits(model), EXPECTED["fusion_parallel/logits"], atol=1e-5)
    model.save_pretrained(tmp_path / "all", ["mixed"])
    again = PeftModel.from_pretrained(make_base(), tmp_path / "all" / "mixed")
    np.testing.assert_array_equal(logits(again), logits(model))
    assert not list(again.trainable_params())


def test_adapters_are_trained_too_if_wanted():
    config = AdapterFusionConfig(adapter_names=["a", "b"], train_adapters=True, task_type="SEQ_CLS")
    model = fresh([SeqBnConfig(), ParBnConfig(), config])
    leaves = {parameter.name.split("output.")[-1] for parameter in model.trainable_params()}
    assert {"adapter_down.weight", "slot1.adapter_down.weight", "classifier.weight"} <= leaves
    assert {f"slot2.adapter_fusion.{leaf}.weight" for leaf in ("query", "key", "value")} <= leaves


def test_a_fresh_value_matrix_is_the_identity():
    model = fresh([SeqBnConfig(), AdapterFusionConfig(adapter_names=["a"])])
    for parameter in model.trainable_params():
        if "value" in parameter.name:
            np.testing.assert_array_equal(np.diag(parameter.asnumpy()), 1.0)
            assert parameter.asnumpy()[0, 1] == np.float32(1e-6)


def test_scores_are_dropped_while_training_only():
    names = {"adapter_names": ["a", "b"]}
    parts = [SeqBnConfig(init_weights="houlsby"), SeqBnConfig(non_linearity="gelu")]
    plain = randomised(fresh([*parts, AdapterFusionConfig(**names, train_adapters=True)]))
    model = randomised(fresh([*parts, AdapterFusionConfig(**names, train_adapters=True, dropout_prob=0.5)]))
    np.testing.assert_array_equal(logits(model), logits(plain))
    model.set_train(True)
    found = [logits(model) for _ in range(6)]
    assert any(not np.array_equal(found[0], other) for other in found)


def tensors_of(folder):
    path = next(folder / name for name in FUSION_WEIGHT_NAMES if (folder / name).is_file())
    with open_checkpoint(path) as checkpoint:
        return {name: checkpoint[name].numpy() for name in checkpoint}


@pytest.mark.parametrize("name", FUSIONS)
def test_what_is_written_is_what_the_library_wrote(tmp_path, name):
    import_fusion(DATA / FUSIONS[name], tmp_path / "ours")
    export_fusion(tmp_path / "ours", tmp_path / "theirs", model_type="bert", model_name="")
    expected, found = (tensors_of(folder / FUSIONS[name]) for folder in (DATA, tmp_path / "theirs"))
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        np.testing.assert_array_equal(found[key], value, err_msg=key)
    for folder in (FUSIONS[name], *FUSIONS[name].split(",")):
        file = "adapter_fusion_config.json" if "," in folder else "adapter_config.json"
        expected, found = (
            json.loads((root / folder / file).read_text()) for root in (DATA, tmp_path / "theirs")
        )
        assert found == expected


def test_convert_adapter_takes_fusions_both_ways(tmp_path):
    done = convert_adapter(DATA / "gated,par_bn", tmp_path / "ours")
    assert (done.source_format, done.method) == ("adapterhub", "BOTTLENECK + BOTTLENECK + ADAPTER_FUSION")
    done = convert_adapter(tmp_path / "ours", tmp_path / "theirs", to="adapterhub")
    assert (done.source_format, done.tensors) == ("peft", 14 + 8 + 8)
    assert {path.name for path in (tmp_path / "theirs").iterdir()} == {"gated", "par_bn", "gated,par_bn"}
    model = get_peft_model(make_base(), [LoraConfig(target_modules=["query"]), SeqBnConfig()])
    model.save_pretrained(tmp_path / "hybrid")
    with pytest.raises(InputError, match="LORA and BOTTLENECK in 2 parts, but ends in no fusion"):
        convert_adapter(tmp_path / "hybrid", tmp_path / "out", to="adapterhub")


def test_odd_names_of_adapters_are_refused(tmp_path):
    model = fresh([SeqBnConfig(), AdapterFusionConfig(adapter_names=["../a"])])
    model.save_pretrained(tmp_path / "ours")
    with pytest.raises(InputError, match=r"'\.\./a' can't name an adapter"):
        export_fusion(tmp_path / "ours", tmp_path / "theirs")
    assert not (tmp_path / "a").exists()


def copied(tmp_path, change=None, rename=None):
    """A stored fusion with changes, beside its adapters."""
    for name in ("seq_bn", "norms"):
        (tmp_path / name).symlink_to(DATA / name)
    folder = tmp_path / "fusion"
    folder.mkdir()
    stored = DATA / "seq_bn,norms"
    content = json.loads((stored / "adapter_fusion_config.json").read_text()) | (change or {})
    (folder / "adapter_fusion_config.json").write_text(json.dumps(content))
    tensors = load_file(stored / FUSION_WEIGHT_NAMES[0])
    save_file(
        {(rename or str)(key): value for key, value in tensors.items()}, folder / FUSION_WEIGHT_NAMES[0]
    )
    return folder


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"change": {"config": 3}}, 'no "config" with keys'),
        ({"change": {"config": {"value": "yes"}}}, "value must be true or false"),
        ({"change": {"adapter_names": ["seq_bn", "other"]}}, "no folder of it beside it"),
        ({"change": {"adapter_names": ["seq_bn", "../norms"]}}, "no folder of it beside it"),
        ({"change": {"adapter_names": ["seq_bn", "n" * 300]}}, "no folder of it beside it"),
        ({"change": {"adapter_names": [1, {}]}}, "adapter_names must be a list of names"),
        ({"change": {"adapter_names": ["seq_bn", "seq_bn"]}}, "must be different names"),
        ({"rename": lambda key: key.replace("0.output", "0.attention.output")}, "mh_adapter must be the"),
        ({"rename": lambda key: key.replace("query", "dense")}, "of no AdapterFusion"),
        ({"rename": lambda key: key.replace("0.output.adapter_fusion_layer.seq_bn,norms",
                                            "0.output.adapter_fusion_layer.b")}, "several fusions"),
    ],
)  # fmt: skip
def test_foreign_folders_are_refused(tmp_path, changes, message):
    with pytest.raises(InputError, match=message):
        import_fusion(copied(tmp_path, **changes), tmp_path / "out")


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"key": False, "query": False, "value": False}, "there would be nothing to train"),
        ({"dropout_prob": 1.5}, r"dropout_prob must lie in \[0, 1\)"),
        ({"temperature": 50}, "temperature must be true or false"),
        ({"adapter_names": "ab"}, "adapter_names must be a list of names"),
        ({"output_adapter": False}, "mh_adapter or output_adapter must be true"),
    ],
)
def test_bad_configs_are_refused(keys, message):
    with pytest.raises(InputError, match=message):
        AdapterFusionConfig(**keys)


def test_bad_mixtures_are_refused(tmp_path):
    names = AdapterFusionConfig(adapter_names=["a", "b"])
    for parts in (
        [names],
        [SeqBnConfig(), names],
        [SeqBnConfig(), LoraConfig(target_modules=["query"]), names],
    ):
        with pytest.raises(InputError, match="must follow as many parts of BOTTLENECK"):
            get_peft_model(make_base(), parts)
    model = opened(tmp_path, "seq_bn", "double_seq_bn")
    model.add_adapter("lora", LoraConfig(target_modules=["query"]))
    for chosen, message in (
        (["seq_bn", "double_seq_bn"], "mh_adapter must be the same"),
        (["seq_bn", "lora"], "'lora' is of LORA"),
        ([], "at least one"),
        (["seq_bm"], "did you mean 'seq_bn'"),
    ):
        with pytest.raises(InputError, match=message):
            model.add_fusion_adapter(chosen, "mixed")
    with pytest.raises(InputError, match="needs an AdapterFusionConfig"):
        model.add_fusion_adapter(["seq_bn"], "mixed", SeqBnConfig())
    assert list(model.peft_config) == ["seq_bn", "double_seq_bn", "lora"]
