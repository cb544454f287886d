"""Every method against torch + transformers + peft: forward, gradient, curve, files both ways, merging.

What each test measures goes, as a line of JSON, into the file that ``MINDPEFT_MATRIX`` names, if it is set:
``scripts/method_matrix.py`` makes docs/methods.md of it.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import mindspore as ms
import numpy as np
import peft
import pytest
import torch
import transformers
from mindspore import Tensor

import mindpeft
from mindpeft import PeftModel, get_peft_model
from mindpeft import models as our_models
from mindpeft.train.optim import AdamW
from mindpeft.train.runner import StepRunner
from tests.models import reference
from tests.models.reference import make_batch, make_reference, open_ours, run_ours, run_theirs
from tests.parity.adapters import (
    add_noise,
    open_in_peft,
    plain_name,
    randomise,
    trained_here,
    trained_in_peft,
)
from tests.parity.case import HEADS, TASK_TYPES, Case, all_cases

pytestmark = pytest.mark.usefixtures("pynative")

CLASSES = {"sequence": 4, "token": 5, "masked": reference.SIZES["vocab_size"]}
STEPS = 20
CASES = {case.name: case for case in all_cases()}
ON_TINY = [(name, head) for name, case in CASES.items() for head in case.heads]
ON_MINILM = [pytest.param(name, head, marks=pytest.mark.slow) for name, head in ON_TINY]
# One head is enough to see a curve; the others are for the slow run.
CURVES = [
    pytest.param(name, head, marks=() if head == CASES[name].heads[0] else pytest.mark.slow)
    for name, head in ON_TINY
]


@pytest.fixture(scope="module")
def bases(tmp_path_factory, minilm_dir):
    """Gives the folder of a base model: a tiny random one, or MiniLM with a fresh head; made once."""
    made: dict[tuple[str, str], Path] = {}

    def folder(size: str, head: str) -> Path:
        if (size, head) not in made:
            path = made[size, head] = tmp_path_factory.mktemp(f"{size}-{head}")
            if size == "tiny":
                make_reference(head, path, num_labels=CLASSES[head])
            else:
                torch.manual_seed(0)
                theirs = open_theirs(minilm_dir, head, num_labels=CLASSES[head])
                theirs.save_pretrained(path)
        return made[size, head]

    return folder


def open_theirs(folder: Path, head: str, **options: Any) -> transformers.PreTrainedModel:
    auto = getattr(transformers, reference.HEADS[head])
    return auto.from_pretrained(folder, attn_implementation="eager", **options).eval()


def open_base(folder: Path, head: str) -> ms.nn.Cell:
    no_dropout = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    return getattr(our_models, reference.HEADS[head]).from_pretrained(folder, **no_dropout)


def theirs_of(case: Case, folder: Path, head: str, noise: float = 0.05) -> peft.PeftModel:
    """PEFT's model with a fresh adapter, noise on all that is trained."""
    torch.manual_seed(3)
    base = open_theirs(folder, head, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    options = {"task_type": TASK_TYPES.get(head), **case.options, **case.peft_options}
    model = peft.get_peft_model(base, getattr(peft, case.config)(**options))
    add_noise(model, noise)
    return model.eval()


def config_of(case: Case, head: str) -> mindpeft.PeftConfig:
    return getattr(mindpeft, case.config)(task_type=TASK_TYPES.get(head), **case.options)


def inputs(size: str) -> dict[str, np.ndarray]:
    return make_batch(length=19, types=2) if size == "minilm" else make_batch()


def labels_for(head: str, batch: dict[str, np.ndarray], seed: int = 5) -> np.ndarray:
    shape = batch["input_ids"].shape
    shape = shape[:1] if head == "sequence" else shape
    labels = np.random.default_rng(seed).integers(0, CLASSES[head], shape).astype(np.int32)
    if head != "sequence":
        labels[batch["attention_mask"] == 0] = -100
    return labels


def logits_of_theirs(model: peft.PeftModel, batch: dict[str, np.ndarray]) -> torch.Tensor:
    """PEFT's logits; of a model with an output for each token, those of the real tokens."""
    logits = run_theirs(model, **batch).logits
    return logits if logits.ndim == 2 else logits[:, -batch["input_ids"].shape[1] :]


def loss_of_theirs(model: peft.PeftModel, batch: dict[str, np.ndarray], labels: np.ndarray) -> torch.Tensor:
    logits = logits_of_theirs(model, batch)
    target = torch.tensor(labels).long().reshape(-1)
    return torch.nn.functional.cross_entropy(logits.reshape(-1, logits.shape[-1]), target)


def note(case: str, head: str, what: str, error: float) -> None:
    """Put a measured error down for the table of methods."""
    path = os.environ.get("MINDPEFT_MATRIX")
    if path:
        with open(path, "a", encoding="utf-8") as file:
            file.write(json.dumps({"case": case, "head": head, "what": what, "error": error}) + "\n")


def assert_small(case: str, head: str, what: str, error: float, limit: float) -> None:
    assert error <= limit, f"{what}: {error:.2e}"
    note(case, head, what, error)


def run_forward_and_gradients(bases, tmp_path, name: str, head: str, size: str) -> None:
    case, folder, batch = CASES[name], bases(size, head), inputs(size)
    theirs = theirs_of(case, folder, head)
    theirs.save_pretrained(tmp_path)
    ours = PeftModel.from_pretrained(open_base(folder, head), tmp_path, is_trainable=True).set_train(False)
    assert ours.get_nb_trainable_parameters() == numbers_of(theirs, case)
    logits = logits_of_theirs(theirs, batch)
    error = reference.absolute_error(run_ours(ours, **batch), logits)
    assert_small(name, head, "peft → read, forward", error / scale_of(logits), case.tolerance)

    labels = labels_for(head, batch)
    loss_of_theirs(theirs, batch, labels).backward()
    expected = {
        case.names.get(plain_name(key), plain_name(key)): value.grad
        for key, value in trained_in_peft(theirs).items()
        if value.grad is not None
    }
    parameters = trained_here(ours)
    assert parameters.keys() == expected.keys()
    gradients = gradients_of(ours, list(parameters.values()), batch, labels)
    largest = max(float(value.abs().max()) for value in expected.values())
    worst = 0.0
    for key, gradient in zip(parameters, gradients, strict=True):
        size_of_it = max(float(expected[key].abs().max()), 1e-2 * largest)
        worst = max(worst, reference.absolute_error(gradient, expected[key]) / size_of_it)
    assert_small(name, head, "gradient", worst, 1e-4)


def numbers_of(theirs: peft.PeftModel, case: Case) -> tuple[int, int]:
    return theirs.get_nb_trainable_parameters()


def scale_of(logits: torch.Tensor) -> float:
    """Errors of logits of more than 1 are relative to the largest."""
    return max(1.0, float(logits.abs().max()))


def gradients_of(model: PeftModel, parameters: list, batch: dict[str, np.ndarray], labels: np.ndarray):
    def forward(input_ids, attention_mask, token_type_ids, labels):
        return model(input_ids, attention_mask, token_type_ids, None, labels)[0]

    function = ms.value_and_grad(forward, None, ms.ParameterTuple(parameters))
    return function(*(Tensor(value) for value in (*batch.values(), labels)))[1]


@pytest.mark.parametrize(("name", "head"), ON_TINY)
def test_forward_and_gradients(bases, tmp_path, name, head):
    run_forward_and_gradients(bases, tmp_path, name, head, "tiny")


@pytest.mark.parametrize(("name", "head"), ON_MINILM)
def test_forward_and_gradients_of_minilm(bases, tmp_path, name, head):
    run_forward_and_gradients(bases, tmp_path, name, head, "minilm")


def run_written_and_merged(bases, tmp_path, name: str, head: str, size: str) -> None:
    case, folder, batch = CASES[name], bases(size, head), inputs(size)
    ms.set_seed(0)
    ours = get_peft_model(open_base(folder, head), config_of(case, head)).set_train(False)
    randomise(ours)
    ours.save_pretrained(tmp_path)
    found = run_ours(ours, **batch)
    expected = logits_of_theirs(open_in_peft(open_theirs(folder, head), tmp_path), batch)
    error = reference.absolute_error(found, expected) / scale_of(expected)
    assert_small(name, head, "write → peft", error, case.tolerance)
    bare = run_theirs(open_theirs(folder, head), **batch).logits
    assert (bare - expected).abs().max() > 1e-4  # the adapter does something
    if not case.merges:
        with pytest.raises(mindpeft.errors.InputError, match="merged"):
            ours.merge_adapter()
        return
    merged = run_ours(ours.merge_and_unload(), **batch)
    assert_small(
        name,
        head,
        "merge",
        reference.absolute_error(merged, expected) / scale_of(expected),
        2 * case.tolerance,
    )


@pytest.mark.parametrize(("name", "head"), ON_TINY)
def test_written_and_merged(bases, tmp_path, name, head):
    run_written_and_merged(bases, tmp_path, name, head, "tiny")


@pytest.mark.parametrize(("name", "head"), ON_MINILM)
def test_written_and_merged_of_minilm(bases, tmp_path, name, head):
    run_written_and_merged(bases, tmp_path, name, head, "minilm")


@pytest.mark.parametrize(("name", "head"), CURVES)
def test_training_curve(bases, tmp_path, name, head):
    """Twenty steps of AdamW in one compiled graph, from the same adapter on the same batches."""
    case, folder = CASES[name], bases("tiny", head)
    theirs = theirs_of(case, folder, head, noise=0.02)
    theirs.save_pretrained(tmp_path)
    ours = PeftModel.from_pretrained(open_ours(head, folder), tmp_path, is_trainable=True).set_train()
    batches = [make_batch(seed=seed) for seed in range(4)]
    data = [(batch, labels_for(head, batch, seed)) for seed, batch in enumerate(batches)]
    optimizer = torch.optim.AdamW(
        [p for p in theirs.parameters() if p.requires_grad], case.rate, weight_decay=0
    )
    ms.set_context(mode=ms.GRAPH_MODE)
    runner = StepRunner(ours, AdamW(ours))
    worst, first, last = 0.0, 0.0, 0.0
    for step in range(STEPS):
        batch, labels = data[step % len(data)]
        loss = loss_of_theirs(theirs, batch, labels)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(theirs.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        found, _ = runner.train({**batch, "labels": labels}, step + 1, case.rate)
        worst = max(worst, abs(found - float(loss.detach())))
        first, last = first + found * (step < 4), last + found * (step >= STEPS - 4)
    assert runner.graphs == 1
    assert last < first  # something was learned
    assert_small(name, head, "curve", worst, 1e-3)


def test_the_cases_cover_the_heads():
    assert all(set(case.heads) <= set(HEADS) for case in CASES.values())
