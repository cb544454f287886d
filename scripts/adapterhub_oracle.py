"""What AdapterHub's `adapters` library computes, stored for the tests of bottleneck adapters.

Run it in an environment of its own (`adapters` wants another transformers than the tests do):

    pip install torch==2.13.0 adapters==1.2.0
    python scripts/adapterhub_oracle.py tests/tuners/data/adapterhub

It writes a random BERT (`base/`), a folder per adapter as the library saves it, and `expected.safetensors`:
the batch, and for each adapter the logits, the gradient of every trained parameter, the losses of 20 steps of
plain gradient descent, and the number of trained parameters. Weights are float32, the arithmetic is float64.
`heads.safetensors` holds the same of some adapters in the same encoder under other heads, with those heads'
weights. Everything follows from fixed seeds.
"""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path
from typing import Any

import adapters
import torch
import transformers
from adapters.composition import Fuse, Stack
from safetensors.torch import save_file

SIZES = {  # those of tests/models/reference.py
    "vocab_size": 61,
    "hidden_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 56,
    "max_position_embeddings": 24,
    "type_vocab_size": 3,
    "layer_norm_eps": 1e-12,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
}
LABELS, STEPS, RATE = [0, 2, 1], 20, 0.01

# name -> the library's config. Compacter's bottleneck must be a multiple of phm_dim, which 48 / 32 is not.
# The library wants torchvision for stochastic depth, which does nothing outside training: it is left out.
CASES: dict[str, Any] = {
    "seq_bn": adapters.SeqBnConfig(),
    "double_seq_bn": adapters.DoubleSeqBnConfig(reduction_factor=8),
    "par_bn": adapters.ParBnConfig(reduction_factor=4),
    "scaled_par_bn": adapters.ParBnConfig(reduction_factor=8, scaling="learned"),
    "adapter_plus": adapters.AdapterPlusConfig(stochastic_depth=0.0),
    "compacter": adapters.CompacterConfig(reduction_factor=4),
    "compacter_plus_plus": adapters.CompacterPlusPlusConfig(reduction_factor=6, phm_bias=False),
    "own_rules": adapters.CompacterConfig(
        reduction_factor=12, shared_phm_rule=False, factorized_phm_rule=True, phm_dim=2, phm_rank=2
    ),
    "own_matrices": adapters.CompacterPlusPlusConfig(
        reduction_factor=12, shared_phm_rule=False, factorized_phm_W=False
    ),
    "shared_matrices": adapters.CompacterConfig(
        reduction_factor=4, shared_W_phm=True, factorized_phm_rule=True, ln_before=True, scaling="channel"
    ),
    "per_layer": adapters.DoubleSeqBnConfig(
        reduction_factor={"1": 24, "default": 12}, non_linearity="leakyrelu", original_ln_before=True
    ),
    "leave_out": adapters.SeqBnConfig(leave_out=[0], residual_before_ln="post_add", scaling=0.5),
    "norms": adapters.SeqBnConfig(ln_before=True, ln_after=True, scaling="channel", non_linearity="tanh"),
    "norms_inside": adapters.DoubleSeqBnConfig(
        ln_after=True, adapter_residual_before_ln=True, residual_before_ln=False, original_ln_before=True
    ),
    "parallel_norms": adapters.ParBnConfig(
        reduction_factor=12, mh_adapter=True, ln_before=True, ln_after=True, scaling=2.0
    ),
    "gated": adapters.SeqBnConfig(use_gating=True, residual_before_ln=False, scaling="learned"),
    "parallel_gated": adapters.ParBnConfig(reduction_factor=24, mh_adapter=True, use_gating=True),
    "invertible": adapters.SeqBnInvConfig(non_linearity="gelu", inv_adapter_reduction_factor=3),
    "double_invertible": adapters.DoubleSeqBnInvConfig(inv_adapter_reduction_factor=8),
    "no_norm": adapters.SeqBnConfig(
        original_ln_before=False, original_ln_after=False, residual_before_ln=False, leave_out=[1]
    ),
}
# Those of methods that Hugging Face PEFT has too, and those that mix several methods.
PREFIX = {"prefix_length": 3, "bottleneck_size": 5}
OTHERS: dict[str, Any] = {
    "lora": adapters.LoRAConfig(r=4, alpha=6, leave_out=[1]),
    "lora_all": adapters.LoRAConfig(
        r=3, alpha=2, attn_matrices=["q", "k", "v"], intermediate_lora=True, output_lora=True
    ),
    "lora_gated": adapters.LoRAConfig(r=2, use_gating=True),
    "ia3": adapters.IA3Config(),
    "ia3_scaled": adapters.IA3Config(alpha=2, output_lora=True, attn_matrices=["q", "v"]),
    "prefix": adapters.PrefixTuningConfig(**PREFIX),
    "prefix_flat": adapters.PrefixTuningConfig(flat=True, prefix_length=2),
    "prefix_gated": adapters.PrefixTuningConfig(
        flat=True, prefix_length=2, use_gating=True, shared_gating=False
    ),
    "mam": adapters.MAMConfig(
        adapters.PrefixTuningConfig(**PREFIX), adapters.ParBnConfig(reduction_factor=12)
    ),
    "unipelt": adapters.UniPELTConfig(
        adapters.PrefixTuningConfig(flat=True, prefix_length=3),
        adapters.SeqBnConfig(reduction_factor=12),
        adapters.LoRAConfig(r=2, alpha=2),
    ),
}
WITH_HEAD = ("seq_bn", "par_bn", "lora", "unipelt")
# Mixtures of adapters by attention: the adapters, and the config of the mixture.
VALUE_ALONE = {**adapters.DynamicAdapterFusionConfig().to_dict(), "key": False, "query": False}
ODD = {
    **adapters.DynamicAdapterFusionConfig().to_dict(),
    "query": False,
    "query_before_ln": True,
    "residual_before": True,
    "temperature": True,
    "value_before_softmax": False,
    "value_initialized": False,
}
FUSIONS: dict[str, tuple[tuple[str, ...], Any]] = {
    "fusion_dynamic": (("seq_bn", "norms"), "dynamic"),
    "fusion_parallel": (("gated", "par_bn"), "static"),
    "fusion_odd": (("leave_out", "no_norm", "seq_bn"), ODD),
    "fusion_value": (("per_layer", "norms_inside", "double_seq_bn"), VALUE_ALONE),
}
# Heads other than the one for whole texts, and the adapters that are tried under them.
OTHER_HEADS = {"token": transformers.BertForTokenClassification, "masked": transformers.BertForMaskedLM}
UNDER_THEM = (
    "seq_bn",
    "double_seq_bn",
    "par_bn",
    "scaled_par_bn",
    "adapter_plus",
    "compacter",
    "compacter_plus_plus",
    "invertible",
)
SAFETENSORS = ("seq_bn", "double_seq_bn", "scaled_par_bn", "compacter")  # the others in torch's own format
# Adapters that act one after the other.
STACKS = {
    "stack": ("seq_bn", "double_seq_bn"),
    "stack_parallel_last": ("seq_bn", "par_bn"),
    "stack_language": ("invertible", "seq_bn"),
    "stack_languages": ("double_invertible", "invertible"),
    "stack_mixed": ("par_bn", "adapter_plus", "per_layer"),
}


def make_base() -> torch.nn.Module:
    """A BERT for three classes whose every number is random."""
    torch.manual_seed(0)
    model = transformers.BertForSequenceClassification(transformers.BertConfig(**SIZES, num_labels=3))
    randomise(model.named_parameters(), 0.2)
    return model.eval()


def make_other_base(head: str) -> torch.nn.Module:
    """The encoder of `make_base` under another head, whose every number is random too."""
    encoder = {key: value for key, value in make_base().state_dict().items() if key.startswith("bert.")}
    torch.manual_seed(2)
    model = OTHER_HEADS[head](transformers.BertConfig(**SIZES, num_labels=5))
    randomise(model.named_parameters(), 0.2)
    model.load_state_dict(encoder, strict=False)
    return model.eval()


def randomise(parameters: Any, spread: float) -> None:
    """Overwrite parameters with numbers around 0, or around 1 for factors."""
    with torch.no_grad():
        for name, parameter in parameters:
            around_one = ("norm" in name.lower() and name.endswith("weight")) or name.endswith("scaling")
            parameter.normal_(1.0 if around_one else 0.0, spread)


def make_batch() -> dict[str, torch.Tensor]:
    """Three rows of eleven tokens, two of them padded."""
    torch.manual_seed(1)
    mask = (torch.arange(11) < torch.tensor([[11], [8], [5]])).long()
    ids = torch.randint(1, SIZES["vocab_size"], (3, 11)) * mask
    types = torch.randint(0, SIZES["type_vocab_size"], (3, 11))
    return {"input_ids": ids, "attention_mask": mask, "token_type_ids": types}


def add_adapter(model: torch.nn.Module, name: str, number: int) -> None:
    """Add an adapter with random numbers."""
    model.add_adapter(name, config={**CASES, **OTHERS}[name])
    torch.manual_seed(100 + number)
    own = [(key, value) for key, value in model.named_parameters() if f".{name}." in key]
    randomise(own, 0.3)


def run_case(model: torch.nn.Module, name: str, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """What is expected of one adapter, computed in float64; the model has been trained afterwards."""
    model.train_adapter(name)
    model.classifier.requires_grad_(name in WITH_HEAD)
    return run_training(model, batch, torch.tensor(LABELS))


def add_fusion(model: torch.nn.Module, name: str) -> Fuse:
    """Add some adapters and a mixture of them with random numbers."""
    names, config = FUSIONS[name]
    for adapter in names:
        add_adapter(model, adapter, list(CASES).index(adapter))
    model.add_adapter_fusion(Fuse(*names), config)
    torch.manual_seed(200)
    mixing = [(key, value) for key, value in model.named_parameters() if ".adapter_fusion_layer." in key]
    randomise(((key, value) for key, value in mixing if not key.endswith("value.weight")), 0.05)
    with torch.no_grad():
        for key, value in mixing:
            if key.endswith("value.weight"):
                value += 0.1 * torch.randn_like(value)
    return Fuse(*names)


def run_training(
    model: torch.nn.Module, batch: dict[str, torch.Tensor], labels: torch.Tensor
) -> dict[str, torch.Tensor]:
    """Logits, gradients, and the losses of some steps of plain gradient descent."""
    model.double().eval()
    trained = {key: value for key, value in model.named_parameters() if value.requires_grad}
    losses, expected = [], {}
    for step in range(STEPS):
        logits = model(**batch).logits
        penalty = model.base_model.get_fusion_regularization_loss()
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, -2), labels.flatten())
        loss = loss + (0.0 if penalty is None else penalty)
        gradients = torch.autograd.grad(loss, list(trained.values()), allow_unused=True)
        gradients = [
            torch.zeros_like(value) if gradient is None else gradient
            for value, gradient in zip(trained.values(), gradients, strict=True)
        ]
        if step == 0:
            expected = {f"gradient/{key}": value for key, value in zip(trained, gradients, strict=True)}
            expected["logits"] = logits.detach()
        losses.append(loss.detach())
        with torch.no_grad():
            for value, gradient in zip(trained.values(), gradients, strict=True):
                value -= RATE * gradient
    expected["losses"] = torch.stack(losses)
    expected["trained"] = torch.tensor([sum(value.numel() for value in trained.values())])
    return expected


def run_under(head: str, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """What is expected under another head: its weights, labels, and each adapter's numbers."""
    bare, own = make_other_base(head), make_base().state_dict()
    torch.manual_seed(3)
    labels = torch.randint(0, bare(**batch).logits.shape[-1], batch["input_ids"].shape)
    labels[batch["attention_mask"] == 0] = -100
    expected = {"labels": labels.int()}
    for key, value in bare.named_parameters():  # a tied weight once
        if not (key.startswith("bert.") and key in own):
            expected[f"base/{key}"] = value.detach()
    for name in UNDER_THEM:
        model = make_other_base(head)
        adapters.init(model)
        add_adapter(model, name, list(CASES).index(name))
        model.train_adapter(name)
        for key, value in model.named_parameters():
            value.requires_grad_(f".{name}." in key)
        found = run_training(model, batch, labels)
        expected |= {f"{name}/{key}": value for key, value in found.items()}
    return {f"{head}/{key}": value for key, value in expected.items()}


def save_single(expected: dict[str, torch.Tensor], path: Path) -> None:
    """Save tensors, numbers in float32."""
    save_file(
        {key: value.float() if value.is_floating_point() else value for key, value in expected.items()}, path
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("folder", type=Path, help="where to write; an earlier one is replaced")
    folder = parser.parse_args().folder
    shutil.rmtree(folder, ignore_errors=True)
    batch = make_batch()
    make_base().save_pretrained(folder / "base")
    expected, labels = {key: value.int() for key, value in batch.items()}, torch.tensor(LABELS)
    for number, name in enumerate((*CASES, *OTHERS)):
        model = make_base()
        adapters.init(model)
        add_adapter(model, name, number)
        model.save_adapter(
            folder / name, name, with_head=name in WITH_HEAD, use_safetensors=name in SAFETENSORS
        )
        expected |= {f"{name}/{key}": value for key, value in run_case(model, name, batch).items()}
    for name, (names, _) in FUSIONS.items():
        model = make_base()
        adapters.init(model)
        fuse = add_fusion(model, name)
        model.save_adapter_fusion(folder / ",".join(names), fuse, use_safetensors=name == "fusion_dynamic")
        model.train_adapter_fusion(fuse)
        model.classifier.requires_grad_(False)
        expected |= {f"{name}/{key}": value for key, value in run_training(model, batch, labels).items()}
    model = make_base()  # behind another adapter
    adapters.init(model)
    fuse = add_fusion(model, "fusion_dynamic")
    add_adapter(model, "adapter_plus", list(CASES).index("adapter_plus"))
    model.set_active_adapters(Stack("adapter_plus", fuse))
    expected["stack_fusion/logits"] = model.double().eval()(**batch).logits.detach()
    for stack, names in STACKS.items():
        model = make_base()
        adapters.init(model)
        for name in names:
            add_adapter(model, name, list(CASES).index(name))
        model.set_active_adapters(Stack(*names))
        expected[f"{stack}/logits"] = model.double()(**batch).logits.detach()
    save_single(expected, folder / "expected.safetensors")
    others = [run_under(head, batch) for head in OTHER_HEADS]
    save_single({**others[0], **others[1]}, folder / "heads.safetensors")


if __name__ == "__main__":
    main()
