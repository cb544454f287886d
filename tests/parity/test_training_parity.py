"""Fifty steps of training against torch + peft: the loss curve and the adapter that comes out."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
import transformers
from safetensors.numpy import load_file

from mindpeft import PeftModel
from mindpeft.data.stdlib_docs import load_stdlib_docs
from mindpeft.models import AutoModelForSequenceClassification
from mindpeft.train.optim import AdamW
from mindpeft.train.runner import StepRunner
from mindpeft.train.schedules import get_schedule
from tests.models import reference
from tests.models.reference import make_batch, make_reference, open_ours, run_theirs
from tests.parity.adapters import make_peft_model

pytestmark = pytest.mark.usefixtures("graph_mode")

STEPS, WARMUP, RATE, DECAY = 50, 5, 1e-3, 0.01


def real_batches(folder, count, size=4, length=24):
    """Batches of sentences from docstrings, labelled by topic."""
    table, _ = load_stdlib_docs()
    pairs = [(row.values["text"], row.values["label"]) for row in table.rows]
    topics = sorted({topic for _, topic in pairs})
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    chosen = np.random.default_rng(0).permutation(len(pairs))[: count * size].reshape(count, size)
    for rows in chosen:
        columns = tokenizer(
            [pairs[row][0] for row in rows],
            truncation=True,
            padding="max_length",
            max_length=length,
            return_tensors="np",
        )
        batch = {
            key: columns[key].astype(np.int32) for key in ("input_ids", "attention_mask", "token_type_ids")
        }
        yield {**batch, "labels": np.array([topics.index(pairs[row][1]) for row in rows], np.int32)}


def train_theirs(model, batches, max_grad_norm, accumulation=1):
    """Losses and gradient norms with torch's AdamW, transformers' schedule and torch's clipping."""
    named = [(name, value) for name, value in model.named_parameters() if value.requires_grad]
    groups = [
        {"params": [value for name, value in named if not name.endswith("bias")], "weight_decay": DECAY},
        {"params": [value for name, value in named if name.endswith("bias")], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=RATE)
    schedule = transformers.get_scheduler("linear", optimizer, WARMUP, STEPS)
    losses, norms = [], []
    for group in grouped(batches, accumulation):
        for batch in group:
            loss = run_theirs(model, **batch).loss
            (loss / len(group)).backward()
            losses.append(float(loss.detach()))
        norms.append(float(torch.nn.utils.clip_grad_norm_(model.parameters(), max_grad_norm)))
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    return losses, norms


def train_ours(model, batches, max_grad_norm, accumulation=1):
    """The same with the compiled step."""
    optimizer = AdamW(model, weight_decay=DECAY)
    runner = StepRunner(model, optimizer, accumulation, max_grad_norm)
    factor = get_schedule("linear", WARMUP, STEPS)
    losses, norms = [], []
    for step, group in enumerate(grouped(batches, accumulation), 1):
        for index, batch in enumerate(group, 1):
            loss, norm = runner.train(
                batch, step, RATE * factor(step - 1), update=index == len(group), share=1 / len(group)
            )
            losses.append(loss)
        norms.append(norm)
    assert runner.graphs == 1
    return losses, norms


def grouped(batches, size):
    return [batches[start : start + size] for start in range(0, len(batches), size)]


def assert_same_training(ours, theirs, batches, folder, max_grad_norm, accumulation=1):
    """Losses within 1e-3, and so is every number of the adapters in the end."""
    wanted_losses, wanted_norms = train_theirs(theirs, batches, max_grad_norm, accumulation)
    losses, norms = train_ours(ours, batches, max_grad_norm, accumulation)
    assert len(norms) == len(wanted_norms) == STEPS
    assert sum(norm > max_grad_norm for norm in wanted_norms) >= 5  # clipping did act
    assert np.mean(losses[-5:]) < np.mean(losses[:5])  # and something was learned
    assert reference.absolute_error(losses, wanted_losses) <= 1e-3
    np.testing.assert_allclose(norms, wanted_norms, rtol=1e-2)

    before = load_file(folder / "start" / "adapter_model.safetensors")
    ours.save_pretrained(folder / "ours")
    theirs.save_pretrained(folder / "theirs")
    found, expected = (load_file(folder / side / "adapter_model.safetensors") for side in ("ours", "theirs"))
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert reference.absolute_error(found[name], value) <= 1e-3, name
        assert np.abs(value - before[name]).max() > 5e-3, name  # it moved by far more than that


def test_minilm_on_real_text(minilm_dir, tmp_path):
    torch.manual_seed(0)
    auto = transformers.AutoModelForSequenceClassification
    auto.from_pretrained(minilm_dir, num_labels=15).save_pretrained(tmp_path / "base")
    base = auto.from_pretrained(tmp_path / "base", attn_implementation="eager")
    options = {"r": 8, "lora_alpha": 16, "target_modules": ["query", "value"], "task_type": "SEQ_CLS"}
    theirs = make_peft_model(base, options, noise=0.0)
    theirs.save_pretrained(tmp_path / "start")
    no_dropout = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    ours = AutoModelForSequenceClassification.from_pretrained(tmp_path / "base", **no_dropout)
    ours = PeftModel.from_pretrained(ours, tmp_path / "start", is_trainable=True)
    batches = list(real_batches(minilm_dir, STEPS))
    assert_same_training(ours, theirs, batches, tmp_path, max_grad_norm=0.5)


def test_accumulation_on_a_tiny_model(tmp_path):
    base = make_reference("sequence", tmp_path / "base", num_labels=4)
    options = {"r": 4, "target_modules": ["query", "value"], "task_type": "SEQ_CLS", "bias": "lora_only"}
    theirs = make_peft_model(base, options, noise=0.0)
    theirs.save_pretrained(tmp_path / "start")
    ours = PeftModel.from_pretrained(
        open_ours("sequence", tmp_path / "base"), tmp_path / "start", is_trainable=True
    )
    rng, few = np.random.default_rng(2), []
    for seed in range(4):
        few.append({**make_batch(seed=seed), "labels": rng.integers(0, 4, 3).astype(np.int32)})
    batches = list(itertools.islice(itertools.cycle(few), 2 * STEPS))
    assert_same_training(ours, theirs, batches, tmp_path, max_grad_norm=0.5, accumulation=2)
