"""Small random decoders of transformers, one for every architecture and odd feature; both sides open them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

from mindpeft import PeftModel
from mindpeft.train.optim import AdamW
from mindpeft.train.runner import StepRunner
from tests.models.reference import absolute_error, run_theirs, to_numpy

VOCABULARY, PAD = 97, 3
_SPECIAL = {"vocab_size": VOCABULARY, "pad_token_id": PAD, "bos_token_id": 1, "eos_token_id": 2}
_LLAMA = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
}
_GPT2 = {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 64}
_OPT = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "ffn_dim": 96}
_OPT |= {"max_position_embeddings": 64, "word_embed_proj_dim": 64}
_NEOX = {key: value for key, value in _LLAMA.items() if key != "num_key_value_heads"}
_NEO = {"hidden_size": 64, "num_layers": 2, "num_heads": 4, "max_position_embeddings": 64}


def _rope(kind: str, **settings: Any) -> dict[str, Any]:
    return {**_LLAMA, "rope_scaling": {"rope_type": kind, **settings}}


# Name -> (model_type, keys of config.json). Windows and scalings are so short that 23 tokens feel them.
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", _LLAMA),
    "llama_one_key_head_each": ("llama", {**_LLAMA, "num_key_value_heads": 4, "attention_bias": True}),
    "llama_biases": ("llama", {**_LLAMA, "mlp_bias": True, "tie_word_embeddings": True, "head_dim": 24}),
    "llama_linear": ("llama", _rope("linear", factor=2.0)),
    "llama_dynamic": ("llama", {**_rope("dynamic", factor=2.0), "max_position_embeddings": 16}),
    "llama_llama3": (
        "llama",
        _rope(
            "llama3",
            factor=8.0,
            low_freq_factor=1.0,
            high_freq_factor=4.0,
            original_max_position_embeddings=32,
        ),
    ),
    "llama_yarn": ("llama", _rope("yarn", factor=4.0, original_max_position_embeddings=32)),
    "mistral": ("mistral", {**_LLAMA, "sliding_window": 7}),
    "qwen2": (
        "qwen2",
        {**_LLAMA, "use_sliding_window": True, "sliding_window": 7, "max_window_layers": 1},
    ),
    "qwen3": ("qwen3", {**_LLAMA, "head_dim": 24}),
    "gemma": ("gemma", {**_LLAMA, "head_dim": 16}),
    "gemma2": ("gemma2", {**_LLAMA, "head_dim": 16, "sliding_window": 7, "query_pre_attn_scalar": 24}),
    "gemma3": (
        "gemma3_text",
        {
            **_LLAMA,
            "head_dim": 16,
            "sliding_window": 7,
            "sliding_window_pattern": 2,
            "query_pre_attn_scalar": 24,
            "rope_theta": 1e6,
            "rope_local_base_freq": 1e4,
        },
    ),
    "phi3": ("phi3", {**_LLAMA, "sliding_window": 9}),
    "phi3_longrope": (
        "phi3",
        {
            **_LLAMA,
            "original_max_position_embeddings": 16,
            "rope_scaling": {
                "type": "longrope",
                "short_factor": [1.0 + 0.1 * i for i in range(8)],
                "long_factor": [2.0 + 0.3 * i for i in range(8)],
            },
        },
    ),
    "glm": ("glm", {**_LLAMA, "head_dim": 16}),
    "glm4": ("glm4", {**_LLAMA, "head_dim": 16}),
    "gpt2": ("gpt2", _GPT2),
    "gpt2_scaled_by_layer": ("gpt2", {**_GPT2, "scale_attn_by_inverse_layer_idx": True}),
    "gpt_neo": ("gpt_neo", {**_NEO, "attention_types": [[["global", "local"], 1]], "window_size": 7}),
    "gpt_neox": ("gpt_neox", {**_NEOX, "rotary_pct": 0.25}),
    "gpt_neox_one_after_the_other": ("gpt_neox", {**_NEOX, "use_parallel_residual": False}),
    "bloom": ("bloom", {"hidden_size": 64, "n_layer": 2, "n_head": 4}),
    "bloom_6_heads": (
        "bloom",
        {"hidden_size": 48, "n_layer": 2, "n_head": 6, "apply_residual_connection_post_layernorm": True},
    ),
    "opt": ("opt", _OPT),
    "opt_norms_behind": ("opt", {**_OPT, "word_embed_proj_dim": 32, "do_layer_norm_before": False}),
    "opt_without_affine": ("opt", {**_OPT, "enable_bias": False, "layer_norm_elementwise_affine": False}),
}
# One of each architecture.
ARCHITECTURES = {
    model_type: next(name for name, (kind, _) in CASES.items() if kind == model_type)
    for model_type in dict.fromkeys(kind for kind, _ in CASES.values())
}
_DROPOUTS = (
    "attention_dropout",
    "attn_pdrop",
    "resid_pdrop",
    "embd_pdrop",
    "hidden_dropout",
    "resid_dropout",
    "embed_dropout",
    "dropout",
    "classifier_dropout",
)
NO_DROPOUT = dict.fromkeys(_DROPOUTS, 0.0)


def make_decoder(
    name: str, folder: Path, head: str = "CausalLM", **config: Any
) -> transformers.PreTrainedModel:
    """A random decoder of transformers, saved into ``folder`` with the config.json of its time.

    Biases and norms are random too, and the weights large enough for attention to be far from uniform.
    """
    kind, keys = CASES[name]
    keys = {**_SPECIAL, **keys, **config}
    # transformers rewrites nested settings in place
    made = transformers.AutoConfig.for_model(kind, **json.loads(json.dumps(keys)))
    for key, value in NO_DROPOUT.items():
        if hasattr(made, key):
            setattr(made, key, value)
    torch.manual_seed(0)
    auto = getattr(transformers, f"AutoModelFor{head}" if head else "AutoModel")
    model = auto.from_config(made, attn_implementation="eager")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    model.save_pretrained(folder)
    written = json.loads((folder / "config.json").read_text())
    dropout = {key: value for key, value in written.items() if key in NO_DROPOUT}
    labels = {key: written[key] for key in ("id2label", "label2id") if key in written}
    older = {**keys, **dropout, **labels, "model_type": kind, "architectures": written["architectures"]}
    (folder / "config.json").write_text(json.dumps(older))
    return model.eval()


def train_both(
    ours: PeftModel, theirs: torch.nn.Module, steps: list[dict[str, np.ndarray]], rate: float
) -> tuple[StepRunner, np.ndarray, np.ndarray]:
    """AdamW with clipping on both sides; the runner of ours and the losses of each step."""
    weights = [parameter for parameter in theirs.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(weights, rate, weight_decay=0)
    runner, found, expected = StepRunner(ours.set_train(), AdamW(ours)), [], []
    for number, columns in enumerate(steps):
        loss = run_theirs(theirs, **columns).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        expected.append(float(loss.detach()))
        found.append(float(runner.train(columns, number + 1, rate)[0]))
    return runner, np.array(found), np.array(expected)


def make_texts(length: int = 23, rows: int = 3, left: bool = False) -> dict[str, np.ndarray]:
    """Token ids, all rows but the first padded, on the right or the left."""
    rng = np.random.default_rng(0)
    ids = rng.integers(4, VOCABULARY, (rows, length)).astype(np.int32)
    lengths = np.maximum(2, length - 4 * np.arange(rows))
    mask = (np.arange(length) < lengths[:, None]).astype(np.int32)
    mask = mask[:, ::-1].copy() if left else mask
    return {"input_ids": np.where(mask, ids, PAD).astype(np.int32), "attention_mask": mask}


def scaled_error(found, expected: torch.Tensor, mask: np.ndarray | None = None) -> float:
    """Relative to the largest logit, if that is more than 1; of the tokens in the mask.

    What stands for padding that sees nothing but padding differs between the architectures of transformers.
    """
    found, expected = to_numpy(found), to_numpy(expected)
    if mask is not None:
        found, expected = found[mask == 1], expected[mask == 1]
    return absolute_error(found, expected) / max(1.0, float(np.abs(expected).max()))


def labels_of(batch: dict[str, np.ndarray]) -> np.ndarray:
    return np.where(batch["attention_mask"], batch["input_ids"], -100).astype(np.int32)
