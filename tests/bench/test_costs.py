"""What scripts/bench/limits.py counts against torch's own counts."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode


@pytest.fixture
def bench(monkeypatch):
    """The scripts, which import each other by their bare names."""
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "scripts" / "bench"))
    import costs

    yield costs
    for name in ("costs", "cost_pictures", "limits", "sides", "tables", "train_step"):
        sys.modules.pop(name, None)


def torch_step_of(bench, point, folder):
    return bench.torch_step(bench.write_checkpoint(point.layers, folder), bench.shape_of(point))


def test_products_are_those_that_torch_counts(bench, tmp_path):
    point = bench.Point(rows=2, length=24, rank=4, layers=3)
    step = torch_step_of(bench, point, tmp_path)
    # Plain attention: the counter doesn't know the fused one of CPUs.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        step()
    assert bench.step_products(point) == counter.get_total_flops()


def test_weights_are_those_of_the_model(bench, tmp_path):
    import limits
    import peft
    import transformers

    point = bench.Point(rank=4, layers=2)
    auto = transformers.AutoModelForSequenceClassification
    model = auto.from_pretrained(bench.write_checkpoint(point.layers, tmp_path))
    classifier = sum(number.numel() for number in model.classifier.parameters())
    whole = sum(number.numel() for number in model.parameters())
    arguments = {"task_type": "SEQ_CLS", "r": point.rank, "target_modules": ["query", "value"]}
    adapted = peft.get_peft_model(model, peft.LoraConfig(**arguments))
    assert limits.frozen_weights(point) == whole - classifier
    assert limits.trained_weights(point) == adapted.get_nb_trainable_parameters()[0]
