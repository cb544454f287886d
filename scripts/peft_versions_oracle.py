"""Adapters as earlier releases of Hugging Face PEFT wrote them, stored for tests/test_earlier_peft.py.

Run it once for each release, in an environment of its own (the tests' transformers is too new for them):

    pip install torch==2.13.0 transformers==4.44.2 accelerate==0.34.2 "numpy<2"    # 4.56.2 from PEFT 0.16 on
    pip install --no-deps peft==0.4.0
    python scripts/peft_versions_oracle.py tests/tuners/data/adapterhub tests/tuners/data/peft_versions

It reads the random BERT and the batch of the first folder, and writes ``<release>/<method>`` as PEFT saves it
and ``<release>/expected.safetensors``: the logits with each. Noise from a fixed seed stands for training.
"""

from __future__ import annotations

import argparse
import os
import shutil
from inspect import signature
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"  # saving looks for the base model on the hub

import peft
import torch
import torch.distributed.tensor  # PEFT 0.18 takes it to be there
import transformers
from safetensors.torch import load_file, save_file

QUERY = {"target_modules": ["query", "value"]}
# Method -> (config class, its arguments, the first release that has it).
METHODS = {
    "lora": ("LoraConfig", {"r": 4, "lora_alpha": 8, "bias": "lora_only", **QUERY}, "0.4"),
    "adalora": (
        "AdaLoraConfig",
        {"init_r": 4, "target_r": 2, "lora_dropout": 0.1, "total_step": 9, **QUERY},
        "0.4",
    ),
    "ia3": (
        "IA3Config",
        {"target_modules": ["key", "output.dense"], "feedforward_modules": ["output.dense"]},
        "0.4",
    ),
    "prompt": ("PromptTuningConfig", {"num_virtual_tokens": 3}, "0.4"),
    "p_tuning": ("PromptEncoderConfig", {"num_virtual_tokens": 3, "encoder_hidden_size": 8}, "0.4"),
    "prefix": ("PrefixTuningConfig", {"num_virtual_tokens": 3}, "0.4"),
    "loha": ("LoHaConfig", {"r": 2, **QUERY}, "0.7"),
    "lokr": ("LoKrConfig", {"r": 2, **QUERY}, "0.7"),
    "oft": ("OFTConfig", {"r": 4, **QUERY}, "0.7"),
    "rslora": ("LoraConfig", {"r": 4, "use_rslora": True, "rank_pattern": {"query": 2}, **QUERY}, "0.8"),
    "dora": ("LoraConfig", {"r": 4, "use_dora": True, **QUERY}, "0.10"),
    "vera": ("VeraConfig", {"r": 4, **QUERY}, "0.12"),
    "boft": ("BOFTConfig", {"boft_block_size": 4, **QUERY}, "0.12"),
    "ln_tuning": ("LNTuningConfig", {"target_modules": ["LayerNorm"]}, "0.12"),
    "fourierft": ("FourierFTConfig", {"n_frequency": 20, **QUERY}, "0.12"),
    "hra": ("HRAConfig", {"r": 4, **QUERY}, "0.14"),
    "bone": ("BoneConfig", {"r": 4, **QUERY}, "0.14"),
    "trainable_tokens": (
        "TrainableTokensConfig",
        {"token_indices": [1, 5], "target_modules": ["word_embeddings"]},
        "0.16",
    ),
    "miss": ("MissConfig", {"r": 4, **QUERY}, "0.18"),
    "road": ("RoadConfig", {"group_size": 8, **QUERY}, "0.18"),
}
# PEFT 0.16 loses the classifier's name with methods of virtual tokens: they can't be run there.
BROKEN = {("0.16.0", method) for method in ("prompt", "p_tuning", "prefix")}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("base", type=Path)
    parser.add_argument("folder", type=Path)
    arguments = parser.parse_args()
    target = arguments.folder / peft.__version__
    shutil.rmtree(target, ignore_errors=True)
    target.mkdir(parents=True)
    stored = load_file(arguments.base / "expected.safetensors")
    batch = {key: stored[key].long() for key in ("input_ids", "attention_mask", "token_type_ids")}
    # AdaLoRA of PEFT 0.4 adds to the loss, whether there is one or not, by what it trains.
    needed = {"labels": torch.zeros(3).long()} if peft.__version__ == "0.4.0" else {}
    logits = {}
    for method, (config, options, since) in METHODS.items():
        if as_numbers(since) <= as_numbers(peft.__version__) and hasattr(peft, config):
            if (peft.__version__, method) in BROKEN:
                continue
            if method == "oft" and "oft_block_size" in signature(peft.OFTConfig).parameters:
                options = {**options, "oft_block_size": 0}
            model = adapted(arguments.base / "base", getattr(peft, config)(task_type="SEQ_CLS", **options))
            model.save_pretrained(target / method)
            (target / method / "README.md").unlink(missing_ok=True)
            # What the release itself reads back: not everything that it trains is in its files.
            model = peft.PeftModel.from_pretrained(
                open_base(arguments.base / "base"), target / method, is_trainable=method == "adalora"
            )
            with torch.no_grad():
                logits[method] = model.eval()(**batch, **needed).logits
    save_file(logits, target / "expected.safetensors")


def as_numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split(".")[:2])


def open_base(folder: Path) -> torch.nn.Module:
    auto = transformers.AutoModelForSequenceClassification
    model = auto.from_pretrained(folder, attn_implementation="eager")
    model.config._name_or_path = model.name_or_path = "a/base"
    return model


def adapted(base: Path, config: peft.PeftConfig) -> peft.PeftModel:
    """The BERT with an adapter of that config, noise on all that is trained."""
    torch.manual_seed(0)
    model = peft.get_peft_model(open_base(base), config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    return model.eval()


if __name__ == "__main__":
    main()
