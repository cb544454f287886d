"""Broken adapters in every format that is read: one clear sentence each, and a model that is as it was."""

from __future__ import annotations

import io
import json
import os
import pickle
import shutil
import struct
from dataclasses import fields

import mindspore as ms
import numpy as np
import pytest
import torch
from mindspore.train.checkpoint_pb2 import Checkpoint
from safetensors.numpy import load_file, save_file

from mindpeft import LoraConfig, PeftModel, PromptTuningConfig, get_peft_model
from mindpeft.config import PeftConfig, supported_methods
from mindpeft.errors import InputError
from mindpeft.foreign.convert import convert_adapter
from mindpeft.parameters import base_places
from mindpeft.tuners.plan import BaseModel
from tests.tuners.adapterhub import DATA, make_base

CONFIG = "adapter_config.json"
PEFT, HUB, MLX = "adapter_model.safetensors", "adapter.safetensors", "adapters.safetensors"
QUERY = "base_model.model.encoder.layer.0.attention.self.query.lora_"
DOWN = "bert.encoder.layer.0.output.adapters.seq_bn.adapter_down.0.weight"
NAN, HUGE = float("nan"), 10**400


@pytest.fixture(autouse=True)
def pynative():
    ms.set_context(mode=ms.PYNATIVE_MODE)
    yield
    ms.set_context(mode=ms.GRAPH_MODE)


# Ways to break a folder -----------------------------------------------------------------------------------


def keys(**changes):
    """Values in the config; those of names a__b go into the object a."""

    def change(folder):
        config = json.loads((folder / CONFIG).read_text())
        for name, value in changes.items():
            *outer, key = name.split("__")
            place = config
            for part in outer:
                place = place[part]
            place[key] = value
        (folder / CONFIG).write_text(json.dumps(config))

    return change


def without(*names):
    def change(folder):
        config = json.loads((folder / CONFIG).read_text())
        (folder / CONFIG).write_text(json.dumps({k: v for k, v in config.items() if k not in names}))

    return change


def weights_of(folder):
    return next(folder / name for name in (PEFT, HUB, MLX) if (folder / name).exists())


def tensors(edit):
    """``edit`` changes the dictionary of tensors."""

    def change(folder):
        path = weights_of(folder)
        content = load_file(path)
        edit(content)
        save_file(content, path, metadata={"format": "pt"})

    return change


def put(name, value):
    return tensors(lambda content: content.update({name: np.ascontiguousarray(value)}))


def drop(name):
    return tensors(lambda content: content.pop(name))


def cast(dtype):
    return tensors(lambda c: c.update({name: value.astype(dtype) for name, value in c.items()}))


def rename(old, new):
    return tensors(lambda c: c.update({n.replace(old, new): c.pop(n) for n in list(c)}))


def raw(data, name=CONFIG):
    def change(folder):
        (folder / name if name else weights_of(folder)).write_bytes(data)

    return change


def header(entry):
    text = json.dumps({"x": entry}).encode()
    return raw(struct.pack("<Q", len(text)) + text, None)


def cut(folder):
    path = weights_of(folder)
    path.write_bytes(path.read_bytes()[:-7])


def as_folder(name):
    def change(folder):
        (folder / name).unlink()
        (folder / name).mkdir()

    return change


def as_bin(make, name="adapter_model.bin"):
    def change(folder):
        weights_of(folder).unlink()
        (folder / name).write_bytes(make())

    return change


class Attack:
    """Unpickled by the standard library, it would leave a file behind."""

    def __reduce__(self):
        return os.system, ("touch malicious-pickle-ran",)


def attack():
    return pickle.dumps({"x": Attack()}, protocol=2)


def zipped_attack():
    buffer = io.BytesIO()
    torch.save({"x": Attack()}, buffer)
    return buffer.getvalue()


def half_a_zip():
    buffer = io.BytesIO()
    torch.save({"x": torch.zeros(99)}, buffer)
    return buffer.getvalue()[:-300]


def hybrid(content):
    return raw(json.dumps(content).encode(), "hybrid.json")


# What every format with a config and safetensors can suffer from.
FILES = {
    "json_broken": (raw(b"{"), "adapter_config.json is not valid JSON: .* at line 1"),
    "json_empty": (raw(b""), "adapter_config.json is not valid JSON"),
    "json_binary": (raw(b"\xff\xfe\x00"), "can't read .*adapter_config.json: 'utf-8'"),
    "json_deep": (raw(b"[" * 10**6), "can't read .*adapter_config.json: .*recursion"),
    "json_folder": (as_folder(CONFIG), r"(can't read .*adapter_config.json|holds no adapter_config.json)"),
    "cut": (cut, "is truncated: tensor .* ends at byte"),
    "empty": (raw(b"", None), "has 0 bytes, too few for a header"),
    "noise": (raw(b"\x99" * 64, None), "its header would have .* bytes, more than the 100000000 allowed"),
    "long_header": (raw(struct.pack("<Q", 10**7) + b"{}", None), "can't hold its header of 10000000 bytes"),
    "header_json": (raw(struct.pack("<Q", 2) + b"{x", None), "corrupt safetensors header"),
    "huge_shape": (header({"dtype": "F32", "shape": [2**40, 2**40], "data_offsets": [0, 0]}), "has shape"),
    "huge_tensor": (
        header({"dtype": "F32", "shape": [2**30], "data_offsets": [0, 2**32]}),
        "'x' ends at byte 4294967296",
    ),
    "negative_shape": (header({"dtype": "F32", "shape": [-1], "data_offsets": [0, 0]}), r"has shape \[-1\]"),
    "dtype": (header({"dtype": "C64", "shape": [0], "data_offsets": [0, 0]}), "dtype 'C64'; allowed: F64"),
    "whole_numbers": (cast(np.int32), "has dtype I32; an adapter's are BF16, F16, F32, F64"),
    "booleans": (cast(np.bool_), "has dtype BOOL; an adapter's are BF16"),
}

# What every folder of PEFT's shape can suffer from.
FOLDERS = {
    **FILES,
    "list": (raw(b"[1]"), "adapter_config.json must hold a JSON object"),
    "method_absent": (without("peft_type"), "the key 'peft_type' is missing"),
    "method_unknown": (keys(peft_type="LORAA"), "unknown peft_type 'LORAA'; did you mean 'LORA'"),
    "method_list": (keys(peft_type=["LORA"]), r"unknown peft_type \['LORA'\]"),
    "task": (keys(task_type="CLS"), "unknown task_type 'CLS'.*SEQ_CLS"),
    "revision": (keys(revision=3), "adapter_config.json: revision must be text, not 3"),
    "mapping": (keys(auto_mapping=[1]), "auto_mapping must be an object"),
    "inference": (keys(inference_mode="no"), "inference_mode must be true or false, not 'no'"),
    "saved": (keys(modules_to_save="head"), "modules_to_save must be a list of names, not 'head'"),
    "weights_absent": (
        lambda f: weights_of(f).unlink(),
        "neither adapter_model.safetensors nor adapter_model",
    ),
    "weights_folder": (as_folder(PEFT), "neither adapter_model.safetensors nor adapter_model.bin"),
    "bin_attack": (as_bin(attack), "adapter_model.bin .*system"),
    "bin_attack_zip": (as_bin(zipped_attack), "adapter_model.bin .*system"),
    "bin_empty": (as_bin(bytes), "adapter_model.bin is empty"),
    "bin_cut": (as_bin(half_a_zip), "adapter_model.bin is truncated or damaged"),
    "hybrid_up": (hybrid({"parts": ["../other"]}), "hybrid.json must be .* folders beside it"),
    "hybrid_root": (hybrid({"parts": ["/etc"]}), "hybrid.json must be .* folders beside it"),
    "hybrid_windows": (hybrid({"parts": ["..\\other"]}), "hybrid.json must be .* folders beside it"),
    "hybrid_long": (hybrid({"parts": ["x" * 5000]}), "hybrid.json must be .* folders beside it"),
    "hybrid_none": (hybrid({"parts": []}), "hybrid.json must be"),
    "hybrid_list": (hybrid(["a"]), "hybrid.json must be"),
    "hybrid_twice": (hybrid({"parts": ["a", "a"]}), "hybrid.json names a folder twice"),
    "hybrid_absent": (hybrid({"parts": ["a"]}), "no such adapter folder: .*a$"),
}

LAYERS = {
    **FOLDERS,
    "rank_negative": (keys(r=-1), "r must be a positive integer, not -1"),
    "rank_text": (keys(r="2"), "r must be a positive integer, not '2'"),
    "rank_float": (keys(r=2.0), "r must be a positive integer, not 2.0"),
    "rank_other": (keys(r=3), r"lora_A.weight' is \(2, 16\) in the file and \(3, 16\) in the model"),
    "rank_absurd": (keys(r=10**30), r"is \(2, 16\) in the file and \(1000000"),
    "alpha_nan": (keys(lora_alpha=NAN), "lora_alpha must be a number, not nan"),
    "alpha_huge": (keys(lora_alpha=HUGE), "lora_alpha must be a number, not 1000"),
    "dropout": (keys(lora_dropout=NAN), r"lora_dropout must lie in \[0, 1\), not nan"),
    "pattern_list": (keys(rank_pattern=[1]), r"rank_pattern must be an object of keys and values, not \[1\]"),
    "pattern_key": (keys(rank_pattern={"(": 1}), r"each key of rank_pattern must be a regular expression"),
    "pattern_value": (keys(alpha_pattern={"query": "x"}), r"alpha_pattern\['query'\] must be a number"),
    "pattern_rank": (keys(rank_pattern={"query": 0}), r"rank_pattern\['query'\] must be a positive integer"),
    "flag": (keys(use_dora="yes"), "use_dora must be true or false, not 'yes'"),
    "initial": (keys(init_lora_weights=[1]), r"init_lora_weights must be true, false or text, not \[1\]"),
    "bias": (keys(bias=["none"]), r"bias must be one of none, all, lora_only, not \['none'\]"),
    "targets": (keys(target_modules=[1]), r"target_modules must be a list of names or a regular expression"),
    "targets_regex": (keys(target_modules="("), "is not a regular expression"),
    "targets_none": (
        keys(target_modules=["querry"]),
        "no cell matches target_modules .*did you mean 'query'",
    ),
    "layers": (keys(layers_to_transform=["0"]), "layers_to_transform must be an integer or a list"),
    "layers_name": (
        keys(layers_pattern=5, layers_to_transform=[0]),
        "layers_pattern must be a list of names, not 5",
    ),
    "contradiction": (keys(layers_pattern="layer"), "layers_pattern needs layers_to_transform"),
    "contradiction_bias": (keys(lora_bias=True, use_dora=True), "lora_bias and use_dora can't be used"),
    "extension": (keys(use_qalora=True), "use_qalora=True is not supported"),
    "missing": (drop(f"{QUERY}B.weight"), "missing from the file: 'encoder.layer.0.*lora_B.weight'"),
    "extra": (
        put("base_model.model.zip.lora_A.weight", np.ones((2, 2))),
        "no place for: 'zip.lora_A.weight'",
    ),
    "shape": (put(f"{QUERY}A.weight", np.ones((2, 9))), r"lora_A.weight' is \(2, 9\) in the file"),
    "axes": (put(f"{QUERY}A.weight", np.ones(32)), r"lora_A.weight' is \(32,\) in the file and \(2, 16\)"),
    "one_int": (put(f"{QUERY}A.weight", np.ones((2, 16), np.int64)), "lora_A.weight' has dtype I64"),
    "prefix": (rename("base_model.model.", "model."), "tensor names must start with 'base_model.model.'"),
    "prefix_twice": (
        rename("base_model.model.", "base_model.model.base_model.model."),
        "tensors missing from the file",
    ),
    "other_method": (keys(peft_type="IA3", feedforward_modules=[]), "tensors missing.*ia3_l"),
    "ia3_regex": (keys(peft_type="IA3", feedforward_modules="("), "feedforward_modules must be a regular"),
    "loha_alpha": (keys(peft_type="LOHA", alpha=NAN), "alpha must be a number, not nan"),
    "oft_block": (keys(peft_type="OFT", r=0, oft_block_size=-4), "oft_block_size must be"),
    "adalora_masks": (
        keys(peft_type="ADALORA", total_step=9, rank_pattern={"q": [1]}),
        "rank_pattern must map names to lists of true and false",
    ),
    "freeze": (keys(peft_type="FREEZE", freeze_layers=10**30), "freeze_layers must stay below 10000 layers"),
}

PROMPTS = {
    **FOLDERS,
    "count_none": (without("num_virtual_tokens"), "num_virtual_tokens must be a positive integer, not None"),
    "count_negative": (keys(num_virtual_tokens=-4), "num_virtual_tokens must be a positive integer, not -4"),
    "count_text": (keys(num_virtual_tokens="4"), "num_virtual_tokens must be a positive integer, not '4'"),
    "count_nan": (keys(num_virtual_tokens=NAN), "num_virtual_tokens must be a positive integer, not nan"),
    "count_true": (keys(num_virtual_tokens=True), "num_virtual_tokens must be a positive integer, not True"),
    "count_other": (
        keys(num_virtual_tokens=5),
        r"'prompt_embeddings' is \(4, 48\) in the file and \(5, 48\)",
    ),
    "count_absurd": (keys(num_virtual_tokens=10**30), r"'prompt_embeddings' is \(4, 48\) in the file"),
    "width": (keys(token_dim=32), "token_dim is 32, but the base model's is 48"),
    "width_text": (keys(token_dim="48"), "token_dim must be a positive integer, not '48'"),
    "layers": (keys(num_layers=0), "num_layers must be a positive integer, not 0"),
    "layers_other": (keys(num_layers=99), "num_layers is 99, but the base model's is"),
    "heads": (keys(num_attention_heads=[4]), r"num_attention_heads must be a positive integer, not \[4\]"),
    "stacks": (keys(num_transformer_submodules=2), "num_transformer_submodules must be 1"),
    "seq2seq": (keys(task_type="SEQ_2_SEQ_LM"), "task_type not SEQ_2_SEQ_LM"),
    "initial": (keys(prompt_tuning_init="ZERO"), "prompt_tuning_init must be one of RANDOM"),
    "initial_list": (keys(prompt_tuning_init=[]), "prompt_tuning_init must be"),
    "text_absent": (keys(prompt_tuning_init="TEXT"), "TEXT needs prompt_tuning_init_text"),
    "text_number": (keys(prompt_tuning_init_text=3), "prompt_tuning_init_text must be text, not 3"),
    "options": (keys(tokenizer_kwargs=[1]), "tokenizer_kwargs must be an object"),
    "contradiction": (
        keys(tokenizer_kwargs={"a": 1}),
        "tokenizer_kwargs is for prompt_tuning_init TEXT alone",
    ),
    "missing": (drop("prompt_embeddings"), "missing from the file: 'prompt_embeddings'"),
    "shape": (put("prompt_embeddings", np.ones((4, 47))), r"'prompt_embeddings' is \(4, 47\) in the file"),
    "flat": (put("prompt_embeddings", np.ones(192)), r"'prompt_embeddings' is \(192,\) in the file"),
    "extra": (put("prompt_encoder.weight", np.ones(2)), "no place for: 'prompt_encoder.weight'"),
    "one_bool": (put("prompt_embeddings", np.ones((4, 48), bool)), "'prompt_embeddings' has dtype BOOL"),
    "prefix": (rename("prompt_embeddings", "base_model.prompt"), "no place for: 'prompt'"),
    "prefix_tuning": (keys(peft_type="PREFIX_TUNING"), r"'prompt_embeddings' is \(4, 48\) in the file"),
    "p_tuning": (keys(peft_type="P_TUNING", encoder_num_layers="x"), "encoder_num_layers must be"),
    "p_tuning_kind": (
        keys(peft_type="P_TUNING", encoder_reparameterization_type=["MLP"]),
        "encoder_reparameterization_type must be",
    ),
    "tasks": (keys(peft_type="MULTITASK_PROMPT_TUNING", num_tasks=-1), "num_tasks must be"),
}

HUBS = {
    **FILES,
    "config_list": (keys(config=[]), 'is not from AdapterHub: it has no "config"'),
    "config_absent": (without("config"), "neither peft_type .* nor fine_tune_type .* nor config"),
    "architecture": (keys(config__architecture="lora"), "its architecture is 'lora'"),
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


# The worlds that they are broken in -----------------------------------------------------------------------


@pytest.fixture(scope="module")
def worlds(twins, tmp_path_factory):
    """Format -> (how to make a base model, a sound folder, how to make a folder of PEFT's of it)."""
    folder = tmp_path_factory.mktemp("sound")
    ms.set_context(mode=ms.PYNATIVE_MODE)
    lora = LoraConfig(r=2, target_modules=["query"])
    get_peft_model(twins.make_model(), lora).save_pretrained(folder / "lora")
    prompts = PromptTuningConfig(num_virtual_tokens=4, task_type="SEQ_CLS")
    get_peft_model(make_base(), prompts).save_pretrained(folder / "prompt")
    shutil.copytree(DATA / "seq_bn", folder / "hub")
    (folder / "mlx").mkdir()
    parameters = {"rank": 4, "scale": 2.0, "dropout": 0.1}
    (folder / "mlx" / CONFIG).write_text(
        json.dumps({"fine_tune_type": "lora", "lora_parameters": parameters})
    )
    factors = {"q.lora_a": np.ones((16, 4), np.float32), "q.lora_b": np.ones((4, 16), np.float32)}
    save_file(factors, folder / "mlx" / MLX)
    return {
        "lora": (twins.make_model, folder / "lora", None),
        "prompt": (make_base, folder / "prompt", None),
        "hub": (make_base, folder / "hub", convert_adapter),
    }, folder


@pytest.fixture(scope="module")
def bases(worlds):
    """One base model for all cases of a format, since none may change it, with what it holds."""
    return {kind: watched(make()) for kind, (make, _, _) in worlds[0].items()}


def watched(model):
    return model, {name: place.read() for name, place in base_places(model).items()}, trained(model)


def trained(model):
    return [(name, p.requires_grad) for name, p in model.parameters_and_names()]


def assert_untouched(model, values, flags):
    assert trained(model) == flags
    places = base_places(model)
    assert places.keys() == values.keys()
    for name, value in values.items():
        np.testing.assert_array_equal(places[name].read(), value, err_msg=name)


def assert_refused(message, action):
    with pytest.raises(InputError, match=message) as caught:
        action()
    text = str(caught.value)
    assert "\n" not in text
    assert not os.path.exists("malicious-pickle-ran")


def opened(model, source, convert, scratch):
    if convert is not None:
        convert(source, scratch / "converted")
        source = scratch / "converted"
    return PeftModel.from_pretrained(model, source)


CASES = [
    (kind, name) for kind, table in (("lora", LAYERS), ("prompt", PROMPTS), ("hub", HUBS)) for name in table
]
TABLES = {"lora": LAYERS, "prompt": PROMPTS, "hub": HUBS}


@pytest.mark.parametrize(("kind", "name"), CASES)
def test_broken_folders(worlds, bases, tmp_path, monkeypatch, kind, name):
    monkeypatch.chdir(tmp_path)
    change, message = TABLES[kind][name]
    _, sound, convert = worlds[0][kind]
    shutil.copytree(sound, tmp_path / "in")
    change(tmp_path / "in")
    model, values, flags = bases[kind]
    assert_refused(message, lambda: opened(model, tmp_path / "in", convert, tmp_path))
    assert_untouched(model, values, flags)


@pytest.mark.parametrize("name", MLXS)
def test_broken_mlx_folders(worlds, tmp_path, name):
    change, message = MLXS[name]
    shutil.copytree(worlds[1] / "mlx", tmp_path / "in")
    change(tmp_path / "in")
    assert_refused(message, lambda: convert_adapter(tmp_path / "in", tmp_path / "out"))
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


@pytest.mark.parametrize("kind", TABLES)
def test_a_refused_adapter_leaves_no_trace(worlds, tmp_path, kind):
    """After refusals, the bare model takes a sound adapter; that one then survives refusals too."""
    make, sound, convert = worlds[0][kind]
    model = make()
    for name in ("cut", "missing", "shape", "whole_numbers"):
        shutil.copytree(sound, tmp_path / name)
        TABLES[kind][name][0](tmp_path / name)
        assert_refused(".", lambda n=name: opened(model, tmp_path / n, convert, tmp_path))
    peft_model = opened(model, sound, convert, tmp_path)
    watch = watched(model)
    for name in ("cut", "missing", "shape") if convert is None else ():
        assert_refused(".", lambda n=name: peft_model.load_adapter(tmp_path / n, "second"))
    assert list(peft_model.peft_config) == ["default"]
    assert_untouched(*watch)


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


# Every key of every method ---------------------------------------------------------------------------------

ODD = ["x", "(", [], [1], ["("], [None], {}, {"x": "y"}, {"(": 1}, -1, 10**30, HUGE, 2.5, NAN, True]
# What a method needs besides its defaults, to suit a model this small.
SMALL = {
    "ADALORA": {"total_step": 100},
    "FOURIERFT": {"n_frequency": 10},
    "MISS": {"r": 4},
    "ROAD": {"group_size": 8},
    "TRAINABLE_TOKENS": {"target_modules": ["word_embeddings"]},
}


@pytest.mark.parametrize("method", sorted(supported_methods()))
def test_odd_values_of_every_key(bases, method):
    """A value is taken or refused by name; nothing else is raised, by the config or by what it means here."""
    config_class = supported_methods()[method]
    example = {"peft_type": method.value, **config_class.EXAMPLE, **SMALL.get(method.value, {})}
    base = BaseModel(bases["prompt"][0])
    base.plan(PeftConfig.from_dict(example), from_file=True)
    refused = 0
    for entry in fields(config_class):
        for value in ODD:
            try:
                base.plan(PeftConfig.from_dict({**example, entry.name: value}), from_file=True)
            except InputError:
                refused += 1
    assert refused > 50
