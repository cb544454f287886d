"""Decoders whose code transformers lacks: their weights taken apart or renamed, in models that it has."""

from __future__ import annotations

import json

import mindspore as ms
import numpy as np
import pytest
import torch
import transformers
from mindspore import Tensor

from mindpeft import models as our_models
from mindpeft.models import AutoModelForCausalLM
from tests.models.decoders import CASES, PAD, VOCABULARY, make_decoder, make_texts, scaled_error
from tests.models.reference import run_ours, run_theirs


@pytest.mark.usefixtures("pynative")
def test_internlm2_is_llama_with_joined_weights(tmp_path):
    """transformers has no InternLM2: its weights are taken apart and given to Llama."""
    keys = {**CASES["llama"][1], "vocab_size": VOCABULARY, "pad_token_id": PAD, "bias": False}
    (tmp_path / "config.json").write_text(json.dumps({**keys, "model_type": "internlm2"}))
    config = our_models.AutoConfig.from_pretrained(tmp_path)
    ms.set_seed(0)
    ours = AutoModelForCausalLM.from_config(config)
    for parameter in ours.get_parameters():
        noise = np.random.normal(0, 0.1, parameter.shape).astype(np.float32)
        parameter.set_data(parameter + Tensor(noise))
    weights = {name: torch.tensor(p.asnumpy()) for name, p in ours.parameters_and_names()}
    theirs = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(**{key: value for key, value in keys.items() if key != "bias"})
    ).eval()
    theirs.load_state_dict(internlm2_as_llama(weights, heads=4, groups=2, size=16))
    batch = make_texts()
    assert scaled_error(run_ours(ours, **batch), run_theirs(theirs, **batch).logits) <= 1e-5


def internlm2_as_llama(weights: dict[str, torch.Tensor], heads: int, groups: int, size: int) -> dict:
    renamed = {
        "model.tok_embeddings.weight": "model.embed_tokens.weight",
        "output.weight": "lm_head.weight",
        "attention.wo": "self_attn.o_proj",
        "feed_forward.w1": "mlp.gate_proj",
        "feed_forward.w3": "mlp.up_proj",
        "feed_forward.w2": "mlp.down_proj",
        "attention_norm": "input_layernorm",
        "ffn_norm": "post_attention_layernorm",
    }
    result = {}
    for name, value in weights.items():
        if name.endswith("wqkv.weight"):
            apart = value.reshape(groups, heads // groups + 2, size, -1)
            parts = {"q": apart[:, :-2], "k": apart[:, -2], "v": apart[:, -1]}
            for letter, part in parts.items():
                key = name.replace("attention.wqkv", f"self_attn.{letter}_proj")
                result[key] = part.reshape(-1, value.shape[-1])
            continue
        for old, new in renamed.items():
            name = name.replace(old, new)
        result[name] = value
    return result


@pytest.mark.usefixtures("pynative")
def test_chatglm_is_glm_with_other_names(tmp_path):
    """transformers has GLM in its own layout: ChatGLM's weights are renamed and given to it."""
    theirs = make_decoder("glm", tmp_path / "glm")
    keys = {
        "model_type": "chatglm",
        "num_layers": 2,
        "padded_vocab_size": VOCABULARY,
        "hidden_size": 64,
        "ffn_hidden_size": 96,
        "kv_channels": 16,
        "num_attention_heads": 4,
        "multi_query_group_num": 2,
        "layernorm_epsilon": 1.5625e-7,
        "seq_length": 128,
        "pad_token_id": PAD,
    }
    (tmp_path / "config.json").write_text(json.dumps(keys))
    ours = AutoModelForCausalLM.from_config(our_models.AutoConfig.from_pretrained(tmp_path))
    weights = glm_as_chatglm(theirs.state_dict())
    parameters = dict(ours.parameters_and_names())
    assert parameters.keys() == weights.keys()
    for name, value in weights.items():
        parameters[name].set_data(Tensor(value.numpy()))
    batch = make_texts()
    assert scaled_error(run_ours(ours, **batch), run_theirs(theirs, **batch).logits) <= 1e-5
    ours.save_pretrained(tmp_path / "written")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "written")
    assert not again.load_report.unused
    assert not again.load_report.newly_initialised


def glm_as_chatglm(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    renamed = {
        "model.embed_tokens": "transformer.embedding.word_embeddings",
        "model.layers": "transformer.encoder.layers",
        "model.norm": "transformer.encoder.final_layernorm",
        "lm_head": "transformer.output_layer",
        "self_attn.o_proj": "self_attention.dense",
        "mlp.gate_up_proj": "mlp.dense_h_to_4h",
        "mlp.down_proj": "mlp.dense_4h_to_h",
    }
    result = {}
    for name, value in weights.items():
        if ".q_proj." in name:
            parts = [weights[name.replace("q_proj", f"{letter}_proj")] for letter in "qkv"]
            name, value = name.replace("self_attn.q_proj", "self_attention.query_key_value"), torch.cat(parts)
        elif ".k_proj." in name or ".v_proj." in name:
            continue
        for old, new in renamed.items():
            name = name.replace(old, new)
        result[name] = value
    return result
