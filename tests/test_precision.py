"""bfloat16 on the CPU: matrices alone are stored in it; against torch with the same rounded weights."""

from __future__ import annotations

import mindspore as ms
import numpy as np
import pytest
import torch
from peft import LoraConfig as TorchLoraConfig
from peft import get_peft_model as torch_get_peft_model
from transformers.pytorch_utils import Conv1D

from mindpeft import FullConfig, LoraConfig, PeftModel, get_peft_model
from mindpeft.generate import generate
from mindpeft.models import AutoModelForCausalLM
from mindpeft.precision import computing_dtype
from mindpeft.train.optim import AdamW
from mindpeft.train.runner import StepRunner
from tests.models import decoders
from tests.models.decoders import labels_of, make_decoder, make_texts, scaled_error
from tests.models.reference import (
    make_batch,
    make_reference,
    open_ours,
    relative_error,
    run_ours,
    run_theirs,
    to_numpy,
)

pytestmark = pytest.mark.usefixtures("graph_mode")
_MATRICES = (torch.nn.Linear, torch.nn.Embedding, Conv1D)


def rounded(model: torch.nn.Module) -> torch.nn.Module:
    """The model with its matrices as bfloat16 holds them, in float32."""
    for cell in model.modules():
        if isinstance(cell, _MATRICES):
            cell.weight.data = cell.weight.data.bfloat16().float()
    return model


def dtypes(model) -> dict[str, set[str]]:
    """Which dtypes matrices and vectors have."""
    found: dict[str, set[str]] = {"matrices": set(), "vectors": set()}
    for parameter in model.get_parameters():
        found["matrices" if len(parameter.shape) > 1 else "vectors"].add(str(parameter.dtype))
    return found


def test_matrices_alone_are_narrow(tmp_path):
    make_decoder("qwen2", tmp_path)
    ours = AutoModelForCausalLM.from_pretrained(tmp_path, dtype="bfloat16")
    assert dtypes(ours) == {"matrices": {"BFloat16"}, "vectors": {"Float32"}}
    assert computing_dtype(ours) == ms.float32


def test_a_fresh_head_is_float32(tmp_path):
    make_reference("features", tmp_path)
    ours = open_ours("sequence", tmp_path, dtype="bfloat16")
    assert ours.classifier.weight.dtype == ms.float32
    assert ours.bert.encoder.layer[0].output.dense.weight.dtype == ms.bfloat16


def test_a_tied_table_is_narrow_once(tmp_path):
    theirs = make_decoder("llama_biases", tmp_path)
    assert theirs.config.tie_word_embeddings
    ours = AutoModelForCausalLM.from_pretrained(tmp_path, dtype="bfloat16")
    assert ours.get_input_embeddings().weight.dtype == ms.bfloat16
    names = [name for name, _ in ours.parameters_and_names()]
    assert "lm_head.weight" not in names


@pytest.mark.parametrize("name", sorted(decoders.CASES))
def test_decoders_without_kernels(name, tmp_path, plain_operators):
    """Nothing is rounded but the weights."""
    theirs, batch = rounded(make_decoder(name, tmp_path)), make_texts()
    ours = AutoModelForCausalLM.from_pretrained(tmp_path, dtype="bfloat16")
    found, expected = run_ours(ours, **batch), run_theirs(theirs, **batch).logits
    assert scaled_error(found, expected, batch["attention_mask"]) < 2e-5


@pytest.mark.parametrize("name", ["llama", "gpt2", "bloom", "gpt_neox", "qwen2"])
def test_decoders_are_about_as_far_off_as_torch(name, tmp_path):
    theirs, batch = make_decoder(name, tmp_path), make_texts()
    ours = AutoModelForCausalLM.from_pretrained(tmp_path, dtype="bfloat16")
    mask = batch["attention_mask"]
    in_torch = run_theirs(theirs.bfloat16(), **batch).logits.float()
    expected = run_theirs(rounded(theirs.float()), **batch).logits
    bound = scaled_error(in_torch.detach().numpy(), expected, mask)
    assert scaled_error(run_ours(ours, **batch), expected, mask) < 1.5 * bound < 0.1


@pytest.mark.parametrize("head", ["features", "sequence", "token", "masked"])
def test_encoders(head, tmp_path):
    theirs, batch = rounded(make_reference(head, tmp_path)), make_batch()
    found = run_ours(open_ours(head, tmp_path, dtype="bfloat16"), **batch)
    expected = run_theirs(theirs, **batch)
    pairs = zip(found if isinstance(found, tuple) else (found,), expected.to_tuple(), strict=True)
    assert max(relative_error(*pair) for pair in pairs) < 2e-2


def lora_options() -> dict:
    return {"task_type": "CAUSAL_LM", "r": 4, "lora_alpha": 8, "target_modules": "all-linear"}


def test_training_follows_float32(tmp_path):
    """The loss falls from 13 to less than 8; bfloat16 products move it by some hundredths."""
    theirs = torch_get_peft_model(
        rounded(make_decoder("llama", tmp_path / "base")), TorchLoraConfig(**lora_options())
    )
    theirs.save_pretrained(tmp_path / "start")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype="bfloat16")
    ours = PeftModel.from_pretrained(base, tmp_path / "start", is_trainable=True)
    assert {str(p.dtype) for p in ours.trainable_params()} == {"Float32"}
    texts = make_texts()
    steps = [{**texts, "labels": labels_of(texts)}] * 30
    _, found, expected = decoders.train_both(ours, theirs, steps, 5e-3)
    assert expected[-1] < 0.6 * expected[0]
    np.testing.assert_allclose(found, expected, rtol=2e-2)


def test_what_is_trained_whole_is_widened(tmp_path):
    """In bfloat16 a small step would be lost in rounding."""
    make_decoder("llama", tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, dtype="bfloat16")
    before = {name: to_numpy(p) for name, p in model.parameters_and_names()}
    ours = get_peft_model(model, FullConfig(target_modules=["q_proj", "embed_tokens"]))
    trained = {p.name: p for p in ours.trainable_params()}
    assert {str(p.dtype) for p in trained.values()} == {"Float32"}
    texts = make_texts()
    optimizer = AdamW(ours)
    runner = StepRunner(ours.set_train(), optimizer, 1, 1.0)
    losses = [
        float(runner.train({**texts, "labels": labels_of(texts)}, step, 1e-5)[0]) for step in range(1, 6)
    ]
    assert losses == sorted(losses, reverse=True)
    for name, parameter in trained.items():
        step = np.abs(to_numpy(parameter) - before[name.removeprefix("base_model.")])
        assert 0 < step.max() < 1e-4, name
    assert model.model.layers[0].mlp.up_proj.weight.dtype == ms.bfloat16
    with ours.disable_adapter():
        for name, value in before.items():
            np.testing.assert_array_equal(to_numpy(dict(model.parameters_and_names())[name]), value)


def test_generation(tmp_path):
    """Eight rows and fewer are not rounded: prompts of 7 tokens give what float32 gives."""
    theirs = rounded(make_decoder("llama", tmp_path))
    ours = AutoModelForCausalLM.from_pretrained(tmp_path, dtype="bfloat16")
    prompt = make_texts(7, 1)["input_ids"]
    expected = theirs.generate(torch.tensor(prompt).long(), max_new_tokens=12, do_sample=False)
    found = generate(ours, prompt, max_new_tokens=12, do_sample=False)
    np.testing.assert_array_equal(np.asarray(found)[0, -12:], expected[0, 7:].numpy())


def test_merged_and_saved(tmp_path):
    make_decoder("llama", tmp_path / "base")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype="bfloat16")
    ours = get_peft_model(model, LoraConfig(init_lora_weights=False, **lora_options()))
    texts = make_texts()
    expected = to_numpy(run_ours(ours, **texts))
    merged = ours.merge_and_unload()
    assert dtypes(merged) == {"matrices": {"BFloat16"}, "vectors": {"Float32"}}
    merged.save_pretrained(tmp_path / "merged")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype="auto")
    assert dtypes(again) == dtypes(merged)
    assert relative_error(run_ours(again, **texts), run_ours(merged, **texts)) == 0
    assert relative_error(run_ours(merged, **texts), expected) < 5e-2
