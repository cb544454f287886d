"""Broken folders of Hugging Face PEFT's: one clear sentence each, and a model that is as it was."""

from __future__ import annotations

import shutil
from dataclasses import fields

import mindspore as ms
import numpy as np
import pytest

from mindpeft import LoraConfig, PeftModel, PromptTuningConfig, get_peft_model
from mindpeft.config import PeftConfig, supported_methods
from mindpeft.errors import InputError
from mindpeft.models import AutoModelForCausalLM
from mindpeft.models.gpt2 import GPT2Config
from mindpeft.tuners.plan import BaseModel
from tests.broken_folders import (
    FILES,
    HUGE,
    NAN,
    PEFT,
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
from tests.tuners.adapterhub import make_base

QUERY = "base_model.model.encoder.layer.0.attention.self.query.lora_"

pytestmark = pytest.mark.usefixtures("pynative")

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


TABLES = {"lora": LAYERS, "prompt": PROMPTS}


@pytest.fixture(scope="module")
def worlds(twins, tmp_path_factory):
    """Kind -> how to make a base model, and a sound folder."""
    folder = tmp_path_factory.mktemp("sound")
    ms.set_context(mode=ms.PYNATIVE_MODE)
    lora = LoraConfig(r=2, target_modules=["query"])
    get_peft_model(twins.make_model(), lora).save_pretrained(folder / "lora")
    prompts = PromptTuningConfig(num_virtual_tokens=4, task_type="SEQ_CLS")
    get_peft_model(make_base(), prompts).save_pretrained(folder / "prompt")
    return {"lora": (twins.make_model, folder / "lora"), "prompt": (make_base, folder / "prompt")}


@pytest.fixture(scope="module")
def bases(worlds):
    """One base model for all cases of a kind, since none may change it, with what it holds."""
    return {kind: watched(make()) for kind, (make, _) in worlds.items()}


@pytest.mark.parametrize(("kind", "name"), [(kind, name) for kind in TABLES for name in TABLES[kind]])
def test_broken_folders(worlds, bases, tmp_path, monkeypatch, kind, name):
    monkeypatch.chdir(tmp_path)
    change, message = TABLES[kind][name]
    shutil.copytree(worlds[kind][1], tmp_path / "in")
    change(tmp_path / "in")
    model, values, flags = bases[kind]
    assert_refused(message, lambda: PeftModel.from_pretrained(model, tmp_path / "in"))
    assert_untouched(model, values, flags)


@pytest.mark.parametrize("kind", TABLES)
def test_a_refused_adapter_leaves_no_trace(worlds, tmp_path, kind):
    """After refusals, the bare model takes a sound adapter; that one then survives refusals too."""
    make, sound = worlds[kind]
    model = make()
    for name in ("cut", "missing", "shape", "whole_numbers"):
        shutil.copytree(sound, tmp_path / name)
        TABLES[kind][name][0](tmp_path / name)
        assert_refused(".", lambda n=name: PeftModel.from_pretrained(model, tmp_path / n))
    peft_model = PeftModel.from_pretrained(model, sound)
    watch = watched(model)
    for name in ("cut", "missing", "shape"):
        assert_refused(".", lambda n=name: peft_model.load_adapter(tmp_path / n, "second"))
    assert list(peft_model.peft_config) == ["default"]
    assert_untouched(*watch)


# Every key of every method ---------------------------------------------------------------------------------

ODD = ["x", "(", [], [1], ["("], [None], {}, {"x": "y"}, {"(": 1}, -1, 10**30, HUGE, 2.5, NAN, True]
# What a method needs besides its defaults, to suit a model this small.
SMALL = {
    "ADALORA": {"total_step": 100},
    "C3A": {"block_size": 4},
    "DIFF_PRUNING": {"kept": {}},
    "FOURIERFT": {"n_frequency": 10},
    "MISS": {"r": 4},
    "ROAD": {"group_size": 8},
    "SHIRA": {"r": 2},
    "TRAINABLE_TOKENS": {"target_modules": ["word_embeddings"]},
    "VBLORA": {"vector_length": 4},
    "WAVEFT": {"n_frequency": 10},
}


def small_decoder():
    sizes = {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 16}
    return AutoModelForCausalLM.from_config(GPT2Config.from_dict({}, **sizes))


@pytest.mark.parametrize("method", sorted(supported_methods()))
def test_odd_values_of_every_key(bases, method):
    """A value is taken or refused by name; nothing else is raised, by the config or by what it means here."""
    config_class = supported_methods()[method]
    example = {"peft_type": method.value, **config_class.EXAMPLE, **SMALL.get(method.value, {})}
    base = BaseModel(small_decoder() if method.value == "ADAPTION_PROMPT" else bases["prompt"][0])
    base.plan(PeftConfig.from_dict(example), from_file=True)
    refused = 0
    for entry in fields(config_class):
        for value in ODD:
            try:
                base.plan(PeftConfig.from_dict({**example, entry.name: value}), from_file=True)
            except InputError:
                refused += 1
    assert refused > 50
