"""A real trained decoder learns another style as fast as with torch + PEFT."""

from __future__ import annotations

import mindspore as ms
import numpy as np
import peft
import pytest
import torch
import transformers

from mindpeft import PeftModel
from mindpeft.data.tokenization import AutoTokenizer
from mindpeft.models import AutoModelForCausalLM
from mindpeft.train.runner import StepRunner
from tests.models.decoders import train_both
from tests.models.reference import run_theirs

STEPS, BATCH, LENGTH, RATE = 60, 8, 64, 5e-3


@pytest.fixture(scope="module")
def blocks(shared_dir) -> np.ndarray:
    """Shakespeare as (blocks, length) tokens of the checkpoint's own tokenizer."""
    tokenizer = AutoTokenizer.from_pretrained(shared_dir / "checkpoints" / "stories260K")
    text = (shared_dir / "data" / "tiny_shakespeare" / "input.txt").read_text(encoding="utf-8")
    ids = tokenizer(text[:200_000], truncation=False, add_special_tokens=False)["input_ids"]
    return np.array(ids[: len(ids) // LENGTH * LENGTH], np.int32).reshape((-1, LENGTH))


def perplexity(losses: list[float]) -> float:
    return float(np.exp(np.mean(losses)))


@pytest.mark.usefixtures("graph_mode")
def test_stories260k_learns_shakespeare(shared_dir, blocks, tmp_path):
    folder = shared_dir / "checkpoints" / "stories260K"
    held_out, rows = blocks[-4 * BATCH :].reshape((4, BATCH, LENGTH)), blocks[: STEPS * BATCH]
    batches = rows.reshape((STEPS, BATCH, LENGTH))
    torch.manual_seed(0)
    base = transformers.AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager")
    config = peft.LoraConfig(task_type="CAUSAL_LM", r=8, lora_alpha=16, target_modules="all-linear")
    theirs = peft.get_peft_model(base, config)
    theirs.save_pretrained(tmp_path)
    ours = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(folder), tmp_path, is_trainable=True
    )
    runner = StepRunner(ours)

    def columns(block: np.ndarray) -> dict[str, np.ndarray]:
        return {"input_ids": block, "attention_mask": np.ones_like(block), "labels": block}

    def held_out_perplexities() -> tuple[float, float]:
        mine = [float(runner.evaluate(columns(block))[0]) for block in held_out]
        with torch.no_grad():
            other = [float(run_theirs(theirs.eval(), **columns(block)).loss) for block in held_out]
        return perplexity(mine), perplexity(other)

    before = held_out_perplexities()
    assert before[0] == pytest.approx(before[1], rel=1e-4)
    runner, found, expected = train_both(ours, theirs.train(), [columns(block) for block in batches], RATE)
    after = held_out_perplexities()
    assert np.abs(found - expected).max() <= 1e-3
    assert after[0] < 0.6 * before[0]
    assert after[0] == pytest.approx(after[1], rel=0.02)
    assert ms.get_context("mode") == ms.GRAPH_MODE
