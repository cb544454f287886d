"""Broken adapters of other libraries: one clear sentence each, nothing written, a model that is as it was."""

from __future__ import annotations

import json
import shutil

import mindspore as ms
import numpy as np
import pytest
from mindspore.train.checkpoint_pb2 import Checkpoint
from safetensors.numpy import save_file

from mindpeft import PeftModel
from mindpeft.foreign.convert import convert_adapter
from tests.broken_folders import (
    CONFIG,
    FILES,
    HUB,
    HUGE,
    MLX,
    NAN,
    as_bin,
    as_folder,
    assert_refused,
    assert_untouched,
    attack,
    drop,
    half_a_zip,
    keys,
    put,
    raw,
    rename,
    watched,
    weights_of,
    without,
    zipped_attack,
)
from tests.tuners.adapterhub import DATA, make_base

DOWN = "bert.encoder.layer.0.output.adapters.seq_bn.adapter_down.0.weight"

pytestmark = pytest.mark.usefixtures("pynative")

# AdapterHub -----------------------------------------------------------------------------------------------

HUBS = {
    **FILES,
    "config_list": (keys(config=[]), 'is not from AdapterHub: it has no "config"'),
    "config_absent": (without("config"), "neither peft_type .* nor fine_tune_type .* nor config"),
    "architecture": (keys(config__architecture="reft"), "the architecture 'reft' have no equal"),
    "architecture_list": (keys(config__architecture=["lora"]), "architecture"),
    "architecture_other": (keys(config__architecture="lora"), "alpha must be a number, not None"),
    "architecture_prefix": (keys(config__architecture="prefix_tuning"), "tensors of another method"),
    "factor_nan": (keys(config__reduction_factor=NAN), "reduction_factor must be a number, not nan"),
    "factor_negative": (keys(config__reduction_factor=-2), "reduction_factor must be greater than 0"),
    "factor_huge": (keys(config__reduction_factor=HUGE), "reduction_factor must be a number"),
    "factor_layer": (keys(config__reduction_factor={"²": 2}), "reduction_factor maps layer indices"),
    "factor_value": (keys(config__reduction_factor={"1": "x"}), r"reduction_factor\['1'\] must be a number"),
    "factor_other": (keys(config__reduction_factor=7.5), r"adapter_down.* in the file and"),
    "activation": (keys(config__non_linearity=["relu"]), "non_linearity must be one of"),
    "activation_former": (
        lambda f: (without("version")(f), keys(config__non_linearity=["relu"])(f)),
        "non_linearity must be one of",
    ),
    "scaling": (keys(config__scaling=NAN), "scaling must be a number, not nan"),
    "scaling_zero": (keys(config__scaling=0), "a number that is not 0"),
    "flag": (keys(config__ln_after="yes"), "ln_after must be true or false, not 'yes'"),
    "leave_out": (keys(config__leave_out=3), "leave_out must be a list of layer indices, not 3"),
    "leave_out_entry": (keys(config__leave_out=[-1]), "leave_out's entries must be"),
    "dropout": (keys(config__dropout=2), r"dropout must lie in \[0, 1\)"),
    "nowhere": (keys(config__output_adapter=False, config__mh_adapter=False), "there would be no adapter"),
    "contradiction": (keys(config__inv_adapter_reduction_factor=2), "needs inv_adapter"),
    "earlier": (
        keys(config__invertible_adapter={"block_type": "nice"}),
        "invertible_adapter must be an object",
    ),
    "earlier_text": (keys(config__invertible_adapter="nice"), "invertible_adapter must be an object"),
    "model_name": (keys(model_name=3), "base_model_name_or_path must be text, not 3"),
    "weights_absent": (
        lambda f: weights_of(f).unlink(),
        "neither adapter.safetensors nor pytorch_adapter.bin",
    ),
    "weights_folder": (as_folder(HUB), "neither adapter.safetensors nor pytorch_adapter.bin"),
    "bin_attack": (as_bin(attack, "pytorch_adapter.bin"), "pytorch_adapter.bin .*system"),
    "bin_attack_zip": (as_bin(zipped_attack, "pytorch_adapter.bin"), "pytorch_adapter.bin .*system"),
    "head_attack": (
        lambda f: ((f / "model_head.safetensors").unlink(), raw(attack(), "pytorch_model_head.bin")(f)),
        "pytorch_model_head.bin .*system",
    ),
    "foreign": (put("bert.pooler.weight", np.ones(2)), "tensors of no bottleneck adapter: 'bert.pooler"),
    "several": (put(DOWN.replace("seq_bn", "b"), np.ones(2)), "several adapters: b, seq_bn"),
    "missing": (drop(DOWN), "missing from the file: '.*adapter_down.weight'"),
    "shape": (put(DOWN, np.ones((3, 5))), r"adapter_down.weight' is \(3, 5\) in the file"),
    "prefix": (rename("bert.encoder", "encoder"), "missing from the file: 'bert.encoder"),
}


def opened(model, source, scratch):
    convert_adapter(source, scratch / "converted")
    return PeftModel.from_pretrained(model, scratch / "converted")


@pytest.fixture(scope="module")
def base():
    """One base model for all cases, since none may change it, with what it holds."""
    ms.set_context(mode=ms.PYNATIVE_MODE)
    return watched(make_base())


@pytest.mark.parametrize("name", HUBS)
def test_broken_adapterhub_folders(base, tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    change, message = HUBS[name]
    shutil.copytree(DATA / "seq_bn", tmp_path / "in")
    change(tmp_path / "in")
    model, values, flags = base
    assert_refused(message, lambda: opened(model, tmp_path / "in", tmp_path))
    assert_untouched(model, values, flags)


def test_a_refused_adapter_leaves_no_trace(tmp_path):
    """After refusals, the bare model takes a sound adapter."""
    model = make_base()
    for name in ("cut", "missing", "shape", "whole_numbers"):
        shutil.copytree(DATA / "seq_bn", tmp_path / name)
        HUBS[name][0](tmp_path / name)
        assert_refused(".", lambda n=name: opened(model, tmp_path / n, tmp_path))
    assert list(opened(model, DATA / "seq_bn", tmp_path).peft_config) == ["default"]


# mlx-lm ---------------------------------------------------------------------------------------------------

MLXS = {
    **{name: case for name, case in FILES.items() if name != "huge_tensor"},
    "list": (raw(b"[]"), "adapter_config.json must hold a JSON object"),
    "kind": (keys(fine_tune_type=["lora"]), r"fine_tune_type \['lora'\]: only lora and dora"),
    "scale_nan": (keys(lora_parameters__scale=NAN), "lora_parameters.scale must be a number, not nan"),
    "scale_huge": (keys(lora_parameters__scale=HUGE), "lora_parameters.scale must be a number"),
    "scale_bool": (keys(lora_parameters__scale=True), "lora_parameters.scale must be a number, not True"),
    "dropout_text": (keys(lora_parameters__dropout="x"), r"dropout must lie in \[0, 1\), not 'x'"),
    "dropout_list": (keys(lora_parameters__dropout=[0]), r"dropout must lie in \[0, 1\)"),
    "dropout_nan": (keys(lora_parameters__dropout=NAN), r"dropout must lie in \[0, 1\), not nan"),
    "model": (keys(model=7), "base_model_name_or_path must be text, not 7"),
    "weights_folder": (as_folder(MLX), "holds no adapters.safetensors"),
    "nameless": (put("lora_a", np.ones((4, 2))), "'lora_a' are no tensors of LoRA"),
    "rank_zero": (
        lambda f: (put("q.lora_a", np.ones((16, 0)))(f), put("q.lora_b", np.ones((0, 16)))(f)),
        "'q' has lora_a .* the rank must be 1 or more",
    ),
    "magnitude": (put("q.m", np.ones(3)), r"'q' has m \(3,\), but lora_b \(4, 16\) wants \(16,\)"),
    "axes": (put("q.lora_a", np.ones(16)), r"'q' has lora_a \(16,\)"),
}


@pytest.fixture(scope="module")
def mlx(tmp_path_factory):
    """A sound folder."""
    folder = tmp_path_factory.mktemp("mlx")
    parameters = {"rank": 4, "scale": 2.0, "dropout": 0.1}
    (folder / CONFIG).write_text(json.dumps({"fine_tune_type": "lora", "lora_parameters": parameters}))
    factors = {"q.lora_a": np.ones((16, 4), np.float32), "q.lora_b": np.ones((4, 16), np.float32)}
    save_file(factors, folder / MLX)
    return folder


@pytest.mark.parametrize("name", MLXS)
def test_broken_mlx_folders(mlx, tmp_path, name):
    change, message = MLXS[name]
    shutil.copytree(mlx, tmp_path / "in")
    change(tmp_path / "in")
    assert_refused(message, lambda: convert_adapter(tmp_path / "in", tmp_path / "out"))
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


# MindSpore's .ckpt -----------------------------------------------------------------------------------------


def saved(**named):
    """A file of MindSpore's with these tensors; __ in a name is a dot."""

    def write(path):
        entries = [
            {"name": name.replace("__", "."), "data": ms.Tensor(np.ascontiguousarray(value))}
            for name, value in named.items()
        ]
        ms.save_checkpoint(entries, str(path))

    return write


def message_of(dims, kind="Float32", content=b"\0" * 16):
    """A file of MindSpore's whose one tensor is described so."""

    def write(path):
        file = Checkpoint()
        entry = file.value.add()
        entry.tag = "q.lora_a"
        entry.tensor.dims.extend(dims)
        entry.tensor.tensor_type = kind
        entry.tensor.tensor_content = content
        path.write_bytes(file.SerializeToString())

    return write


def shorter(path):
    saved(q__lora_a=A, q__lora_b=B)(path)
    path.write_bytes(path.read_bytes()[:-40])


A, B = np.ones((4, 16), np.float32), np.ones((16, 4), np.float32)
UNREADABLE = "a.ckpt is no readable MindSpore checkpoint"
CKPTS = {
    "empty": (lambda p: p.write_bytes(b""), UNREADABLE),
    "noise": (lambda p: p.write_bytes(b"\x99" * 99), UNREADABLE),
    "cut": (shorter, UNREADABLE),
    "folder": (lambda p: p.mkdir(), "a.ckpt holds no adapter_config.json"),
    "absent": (lambda p: None, "no such folder, and no .ckpt file: .*a.ckpt"),
    "attack": (lambda p: p.write_bytes(attack()), UNREADABLE),
    "attack_zip": (lambda p: p.write_bytes(zipped_attack()), "a.ckpt .*system"),
    "zip_cut": (lambda p: p.write_bytes(half_a_zip()), "a.ckpt is truncated or damaged"),
    "dims": (message_of([30, 50]), "bytes can't hold tensors of 6000 bytes"),
    "dims_negative": (message_of([-2, 2]), r"'q.lora_a' has shape \(-2, 2\)"),
    "dims_absurd": (message_of([2**40, 2**40]), UNREADABLE),
    "dtype": (message_of([4], "Nothing"), UNREADABLE),
    "whole_numbers": (saved(q__lora_a=A.astype(np.int32), q__lora_b=B), "'q.lora_a' has dtype I32"),
    "booleans": (saved(q__lora_a=A, q__lora_b=B.astype(bool)), "'q.lora_b' has dtype BOOL"),
    "twice": (
        saved(q__lora_a=A, q__mindpet_delta_lora_a=A, q__lora_b=B),
        "two tensors A of LoRA at 'q'",
    ),
    "scalar": (saved(q__lora_a=np.float32(1), q__lora_b=B), "'q' has LoRA tensors .* which are no matrices"),
}
ALPHAS = {
    "nan": (NAN, "lora_alpha must be a number, not nan"),
    "infinite": (float("inf"), "lora_alpha must be a number, not inf"),
    "text": ("8", "lora_alpha must be a number, not '8'"),
    "huge": (HUGE, "lora_alpha must be a number"),
}


@pytest.mark.parametrize("name", CKPTS)
def test_broken_checkpoints(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    make, message = CKPTS[name]
    make(tmp_path / "a.ckpt")
    assert_refused(message, lambda: convert_adapter(tmp_path / "a.ckpt", tmp_path / "out", lora_alpha=4))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ALPHAS)
def test_odd_alphas(tmp_path, name):
    alpha, message = ALPHAS[name]
    saved(q__lora_a=A, q__lora_b=B)(tmp_path / "a.ckpt")
    assert_refused(message, lambda: convert_adapter(tmp_path / "a.ckpt", tmp_path / "out", lora_alpha=alpha))
    assert not (tmp_path / "out").exists()
