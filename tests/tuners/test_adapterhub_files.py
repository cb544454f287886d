"""Folders of AdapterHub's library: its own open here, and those written here are what it would write."""

from __future__ import annotations

import json
import logging
import shutil

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file

from mindpeft import PeftModel, SeqBnConfig
from mindpeft.convert.checkpoint import open_checkpoint
from mindpeft.errors import InputError
from mindpeft.models import AutoModel
from mindpeft.tuners.adapterhub_files import (
    HEAD_NAMES,
    WEIGHT_NAMES,
    export_adapterhub,
    import_adapterhub,
    read_adapterhub,
    write_adapterhub,
)
from tests.tuners.adapterhub import CASES, DATA, EXPECTED, INPUTS, fresh, logits, make_base, randomised

pytestmark = pytest.mark.usefixtures("graph_mode")


def tensors_of(folder, names):
    """The tensors of the first of these files that is there."""
    path = next((folder / name for name in names if (folder / name).is_file()), None)
    if path is None:
        return {}
    with open_checkpoint(path) as checkpoint:
        return {name: checkpoint[name].numpy() for name in checkpoint}


@pytest.mark.parametrize("name", CASES)
def test_what_is_written_is_what_the_library_wrote(tmp_path, name):
    import_adapterhub(DATA / name, tmp_path / "ours")
    about = {"model_type": "bert", "model_name": ""}
    export_adapterhub(tmp_path / "ours", tmp_path / "theirs", name, **about)
    for files in (WEIGHT_NAMES, HEAD_NAMES):
        expected, found = (tensors_of(folder, files) for folder in (DATA / name, tmp_path / "theirs"))
        assert found.keys() == expected.keys()
        for key, value in expected.items():
            np.testing.assert_array_equal(found[key], value, err_msg=key)
    expected, found = (
        json.loads((folder / "adapter_config.json").read_text())
        for folder in (DATA / name, tmp_path / "theirs")
    )
    if found["hidden_size"] is None:  # Compacter without biases does not tell it
        found["hidden_size"] = expected["hidden_size"]
    assert found == expected


def test_another_name(tmp_path):
    model = randomised(fresh(SeqBnConfig(ln_before=True, scaling="channel", task_type="SEQ_CLS")))
    model.save_pretrained(tmp_path / "ours")
    export_adapterhub(tmp_path / "ours", tmp_path / "theirs", "my-task")
    names = load_file(tmp_path / "theirs" / "adapter.safetensors").keys()
    stem = "bert.encoder.layer.0.output.adapters.my-task."
    leaves = {name.removeprefix(stem) for name in names if name.startswith(stem)}
    norm = {
        f"{holder}.{leaf}"
        for holder in ("adapter_norm_before", "adapter_down.0")
        for leaf in ("weight", "bias")
    }
    down = {f"{holder}.{leaf}" for holder in ("adapter_down.1", "adapter_up") for leaf in ("weight", "bias")}
    assert leaves == norm | down | {"scaling"}
    assert load_file(tmp_path / "theirs" / "model_head.safetensors").keys() == {
        "classifier.weight",
        "classifier.bias",
    }
    import_adapterhub(tmp_path / "theirs", tmp_path / "again")
    again = PeftModel.from_pretrained(make_base(), tmp_path / "again")
    np.testing.assert_array_equal(logits(again), logits(model))


def test_an_adapter_of_a_bare_model_gets_the_prefix(tmp_path):
    """Saved from BertModel, names lack "bert."; loaded into a model with a head, they need it."""
    config, tensors = read_adapterhub(DATA / "double_seq_bn")
    bare = {name.removeprefix("bert."): value for name, value in tensors.items()}
    write_adapterhub(tmp_path / "bare", config, bare, "x")
    assert all(key.startswith("encoder.") for key in load_file(tmp_path / "bare" / "adapter.safetensors"))
    import_adapterhub(tmp_path / "bare", tmp_path / "headed", prefix="bert.")
    model = PeftModel.from_pretrained(make_base(), tmp_path / "headed")
    np.testing.assert_allclose(logits(model), EXPECTED["double_seq_bn/logits"], atol=1e-5)
    import_adapterhub(tmp_path / "bare", tmp_path / "encoder")
    encoder = PeftModel.from_pretrained(AutoModel.from_pretrained(DATA / "base"), tmp_path / "encoder")
    headed = model.base_model.bert(*INPUTS)[0].asnumpy()
    np.testing.assert_allclose(encoder(*INPUTS)[0].asnumpy(), headed, atol=1e-6)


def edited(tmp_path, name, config=None, outer=None, rename=None):
    """A copy of a stored folder with changes."""
    folder = tmp_path / "edited"
    shutil.copytree(DATA / name, folder)
    path = folder / "adapter_config.json"
    content = json.loads(path.read_text())
    content["config"] |= config or {}
    content |= outer or {}
    path.write_text(json.dumps({key: value for key, value in content.items() if value != "drop"}))
    if rename:
        tensors = tensors_of(folder, WEIGHT_NAMES)
        for file in WEIGHT_NAMES:
            (folder / file).unlink(missing_ok=True)
        save_file({new: tensors[key] for key in tensors if (new := rename(key))}, folder / WEIGHT_NAMES[0])
    return folder


def test_former_formats(tmp_path):
    """Files of adapter-transformers 1: other holders, "gelu" meaning the approximation, and no version."""
    folder = edited(
        tmp_path,
        "seq_bn",
        {"non_linearity": "gelu"},
        {"version": "drop"},
        lambda key: key.replace(".adapters.", ".layer_text_task_adapters."),
    )
    config, tensors = read_adapterhub(folder)
    assert config.non_linearity == "gelu_new"
    assert tensors.keys() == read_adapterhub(DATA / "seq_bn")[1].keys()


def test_the_former_key_of_invertible_adapters(tmp_path):
    former = {"invertible_adapter": {"block_type": "nice", "non_linearity": "relu", "reduction_factor": 2}}
    config, _ = read_adapterhub(edited(tmp_path / "language", "invertible", former))
    assert (config.inv_adapter, config.inv_adapter_reduction_factor) == ("nice", 2)
    # Adapters for tasks named one too, but never had it.
    config, _ = read_adapterhub(edited(tmp_path / "task", "seq_bn", former, {"type": "text_task"}))
    assert (config.inv_adapter, config.inv_adapter_reduction_factor) == (None, None)


def test_a_config_without_all_keys_has_the_librarys_defaults(tmp_path):
    folder = edited(tmp_path, "seq_bn")
    path = folder / "adapter_config.json"
    few = {"mh_adapter": False, "output_adapter": True, "reduction_factor": 16, "non_linearity": "relu"}
    path.write_text(json.dumps({"config": few, "version": "adapters.1.2.0"}))
    assert read_adapterhub(folder)[0].original_ln_before is False


def test_a_head_of_the_librarys_own_is_left_out(tmp_path, caplog):
    folder = edited(tmp_path, "seq_bn")
    save_file({"heads.x.1.weight": np.zeros((3, 48), np.float32)}, folder / HEAD_NAMES[0])
    with caplog.at_level(logging.WARNING):
        config, tensors = read_adapterhub(folder)
    assert "the head is left out" in caplog.text
    assert config.modules_to_save is None
    assert all("adapter_" in name for name in tensors)


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("seq_bn", {"outer": {"config": None}}, 'has no "config" with keys'),
        ("seq_bn", {"config": {"architecture": "lora"}}, "its architecture is 'lora'"),
        ("seq_bn", {"config": {"inv_adapter": "glow"}}, "inv_adapter must be one of nice"),
        ("seq_bn", {"config": {"non_linearity": "sine"}}, "non_linearity must be one of"),
        ("seq_bn", {"rename": lambda key: key.replace("adapters", "loras")}, "of no bottleneck adapter"),
        ("seq_bn", {"rename": lambda key: key.replace("0.output.adapters.seq_bn", "0.output.adapters.b")},
         "several adapters: b, seq_bn"),
        ("compacter", {"rename": lambda key: None if "shared_" in key else key}, "lacks the tensors that"),
    ],
)  # fmt: skip
def test_foreign_folders_are_refused(tmp_path, name, changes, message):
    with pytest.raises(InputError, match=message):
        read_adapterhub(edited(tmp_path, name, **changes))


def test_missing_and_damaged_files_are_refused(tmp_path):
    folder = edited(tmp_path, "norms")
    weights = folder / "pytorch_adapter.bin"
    weights.write_bytes(weights.read_bytes()[:500])
    with pytest.raises(InputError, match=r"pytorch_adapter\.bin"):
        read_adapterhub(folder)
    torch.save({"x.adapters.norms.adapter_up.weight": torch.nn.Linear(2, 2)}, weights)
    with pytest.raises(InputError, match=r"pytorch_adapter\.bin"):
        read_adapterhub(folder)
    weights.unlink()
    with pytest.raises(InputError, match=r"neither adapter\.safetensors nor pytorch_adapter\.bin is there"):
        read_adapterhub(folder)
    (folder / "adapter_config.json").unlink()
    with pytest.raises(InputError, match="no such file"):
        read_adapterhub(folder)


def test_what_can_not_be_written_is_refused(tmp_path):
    config, tensors = read_adapterhub(DATA / "seq_bn")
    with pytest.raises(InputError, match="must have no dot"):
        write_adapterhub(tmp_path, config, tensors, "a.b")
    with pytest.raises(InputError, match="no tensors in any layer"):
        write_adapterhub(tmp_path, config, {}, "a")
    import_adapterhub(DATA / "seq_bn", tmp_path)
    content = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps({**content, "peft_type": "LORA"}))
    with pytest.raises(InputError, match="peft_type 'LORA' is not read by BottleneckConfig"):
        export_adapterhub(tmp_path, tmp_path / "out")
