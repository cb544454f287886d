"""Every method against its oracle: forward, gradient, curve, files both ways, merging, numbers of parameters.

Most have torch + transformers + peft for one; tests/parity/cases says of each. For AdapterHub's bottleneck
adapters see test_adapterhub.py.
"""

from __future__ import annotations

from pathlib import Path

import mindspore as ms
import numpy as np
import pytest
import torch
from mindspore import Tensor

import mindpeft
from mindpeft import PeftModel, get_peft_model
from mindpeft import models as our_models
from mindpeft.train.optim import AdamW
from mindpeft.train.runner import StepRunner
from mindpeft.train.step import EvalStep
from tests.models import reference
from tests.models.reference import make_batch, make_reference, run_ours, run_theirs
from tests.parity.adapters import randomise, trained_here
from tests.parity.case import HEADS, Case, all_cases
from tests.parity.notes import assert_small, note
from tests.parity.oracles import Oracle, open_theirs

pytestmark = pytest.mark.usefixtures("pynative")

CLASSES = {"sequence": 4, "token": 5, "masked": reference.SIZES["vocab_size"]}
STEPS = 20
CASES = {case.name: case for case in all_cases()}
# By default a method is tried on one head, in turn; the slow run has all of them.
DEFAULT = {name: case.heads[place % len(case.heads)] for place, (name, case) in enumerate(CASES.items())}
ON_TINY = [
    pytest.param(name, head, marks=() if head == DEFAULT[name] else pytest.mark.slow)
    for name, case in CASES.items()
    for head in case.heads
]
ON_MINILM = [pytest.param(*on.values, marks=pytest.mark.slow) for on in ON_TINY]
# Every third graph is trained by default: a curve follows from the gradients and the optimizer's own tests.
TRAINED = [name for name, case in CASES.items() if not case.same_graph][::3]
CURVES = [
    pytest.param(*on.values, marks=on.marks if on.values[0] in TRAINED else pytest.mark.slow)
    for on in ON_TINY
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


def open_base(folder: Path, head: str) -> ms.nn.Cell:
    no_dropout = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    return getattr(our_models, reference.HEADS[head]).from_pretrained(folder, **no_dropout)


def inputs(case: Case, head: str, size: str) -> dict[str, np.ndarray]:
    batch = make_batch(length=19, types=2) if size == "minilm" else make_batch()
    return case.inputs(head, batch)


def labels_for(head: str, batch: dict[str, np.ndarray], seed: int = 5) -> np.ndarray:
    shape = batch["input_ids"].shape
    shape = shape[:1] if head == "sequence" else shape
    labels = np.random.default_rng(seed).integers(0, CLASSES[head], shape).astype(np.int32)
    if head != "sequence":
        labels[batch["attention_mask"] == 0] = -100
    return labels


def scaled_error(found, logits: torch.Tensor) -> float:
    """The largest error of logits, relative to the largest of them if that is more than 1."""
    return reference.absolute_error(found, logits) / max(1.0, float(logits.abs().max()))


def trainable(oracle: Oracle, theirs: torch.nn.Module, folder: Path) -> PeftModel:
    """Our model that trains what the oracle's does: from its files or, where they hold less, from memory."""
    case, base = oracle.case, open_base(oracle.folder, oracle.head)
    if case.in_file_as_trained:
        return PeftModel.from_pretrained(base, folder, is_trainable=True)
    ours = get_peft_model(base, case.config_here(oracle.head))
    parameters, values = trained_here(ours), case.renamed(oracle.trained(theirs))
    assert parameters.keys() == values.keys()
    for name, parameter in parameters.items():
        parameter.set_data(Tensor(values[name].detach().numpy().copy()))
    oracle.prepare(ours)
    return ours


def run_reading(bases, tmp_path, name: str, head: str, size: str) -> None:
    case, folder = CASES[name], bases(size, head)
    batch, oracle = inputs(case, head, size), case.oracle(case, folder, head)
    theirs = oracle.fresh(noise=0.05)
    oracle.save(theirs, tmp_path)
    ours = trainable(oracle, theirs, tmp_path).set_train(False)
    logits = oracle.logits(oracle.precise(theirs), batch).detach()
    read = ours
    if not case.in_file_as_trained:
        read = PeftModel.from_pretrained(open_base(folder, head), tmp_path).set_train(False)
    error = scaled_error(run_ours(read, **batch), logits)
    assert_small(name, size, head, "oracle → read", error, case.tolerance)

    numbers = oracle.numbers(theirs)
    assert ours.get_nb_trainable_parameters()[: len(numbers)] == numbers
    note(name, "parameters", base=size, head=head, error=0.0)

    labels = labels_for(head, batch)
    oracle.loss(theirs, batch, labels).backward()
    found, gradients = gradients_of(ours, batch, labels)
    assert_small(name, size, head, "forward", scaled_error(found, logits), case.tolerance)
    trained = oracle.trained(theirs).items()
    expected = case.renamed({key: value.grad for key, value in trained if value.grad is not None})
    worst = worst_gradient(gradients, expected)
    assert_small(name, size, head, "gradient", worst, max(1e-4, 5 * case.tolerance))


def gradients_of(model: PeftModel, batch: dict[str, np.ndarray], labels: np.ndarray):
    """(logits, name -> gradient)."""
    columns, parameters = {**batch, "labels": labels}, trained_here(model)
    step = EvalStep(model, tuple(columns))

    def forward(*values):
        return step(*values)

    function = ms.value_and_grad(forward, None, ms.ParameterTuple(parameters.values()), has_aux=True)
    (_, logits), gradients = function(*map(Tensor, columns.values()))
    return logits, dict(zip(parameters, gradients, strict=True))


def worst_gradient(found: dict[str, Tensor], expected: dict[str, torch.Tensor]) -> float:
    """The largest error of a gradient, relative to its largest entry or a hundredth of the largest of all."""
    assert found.keys() == expected.keys()
    floor = 1e-2 * max(float(value.abs().max()) for value in expected.values())
    return max(
        reference.absolute_error(found[name], value) / max(float(value.abs().max()), floor)
        for name, value in expected.items()
    )


@pytest.mark.parametrize(("name", "head"), ON_TINY)
def test_forward_and_gradients(bases, tmp_path, name, head):
    run_reading(bases, tmp_path, name, head, "tiny")


@pytest.mark.parametrize(("name", "head"), ON_MINILM)
def test_forward_and_gradients_of_minilm(bases, tmp_path, name, head):
    run_reading(bases, tmp_path, name, head, "minilm")


def run_writing(bases, tmp_path, name: str, head: str, size: str) -> None:
    case, folder = CASES[name], bases(size, head)
    batch, oracle = inputs(case, head, size), case.oracle(case, folder, head)
    ms.set_seed(0)
    ours = get_peft_model(open_base(folder, head), case.config_here(head)).set_train(False)
    randomise(ours)
    ours.save_pretrained(tmp_path)
    found = run_ours(ours, **batch)
    expected = oracle.logits(oracle.precise(oracle.opened(tmp_path)), batch).detach()
    assert_small(name, size, head, "write → oracle", scaled_error(found, expected), case.tolerance)
    known = {key: value for key, value in batch.items() if key not in case.columns}
    bare = run_theirs(oracle.base(), **known).logits
    assert (bare - expected).abs().max() > 1e-4  # the adapter does something
    if not case.merges:
        with pytest.raises(mindpeft.errors.InputError, match="merged"):
            ours.merge_adapter()
        return
    merged = run_ours(ours.merge_and_unload(), **batch)
    assert_small(name, size, head, "merge", scaled_error(merged, expected), 2 * case.tolerance)


@pytest.mark.parametrize(("name", "head"), ON_TINY)
def test_written_and_merged(bases, tmp_path, name, head):
    run_writing(bases, tmp_path, name, head, "tiny")


@pytest.mark.parametrize(("name", "head"), ON_MINILM)
def test_written_and_merged_of_minilm(bases, tmp_path, name, head):
    run_writing(bases, tmp_path, name, head, "minilm")


@pytest.mark.parametrize(("name", "head"), CURVES)
def test_training_curve(bases, tmp_path, name, head):
    """Twenty steps of AdamW in one compiled graph, from the same adapter on the same batches."""
    case, folder = CASES[name], bases("tiny", head)
    oracle = case.oracle(case, folder, head)
    theirs = oracle.fresh(noise=0.02)
    oracle.save(theirs, tmp_path)
    ours = trainable(oracle, theirs, tmp_path).set_train()
    batches = [make_batch(seed=seed) for seed in range(4)]
    data = [(case.inputs(head, batch), labels_for(head, batch, seed)) for seed, batch in enumerate(batches)]
    optimizer = torch.optim.AdamW(oracle.trained(theirs).values(), case.rate, weight_decay=0)
    ms.set_context(mode=ms.GRAPH_MODE)
    runner = StepRunner(ours, AdamW(ours))
    expected, found = [], []
    for step in range(STEPS):
        batch, labels = data[step % len(data)]
        loss = oracle.training_loss(theirs, batch, labels)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(oracle.trained(theirs).values(), 1.0)
        optimizer.step()
        oracle.after_update(theirs, step + 1)
        optimizer.zero_grad()
        expected.append(float(loss.detach()))
        found.append(runner.train({**batch, "labels": labels}, step + 1, case.rate)[0])
    assert runner.graphs == 1
    assert sum(found[-4:]) < sum(found[:4])  # something was learned
    assert_small(name, "tiny", head, "curve", np.abs(np.subtract(found, expected)).max(), 1e-3)


@pytest.mark.parametrize("case", CASES.values(), ids=list(CASES))
def test_the_cases_say_what_is_missing(case):
    assert set(case.heads) <= set(HEADS)
    assert (set(case.heads) == set(HEADS)) != ("heads" in case.why)
    assert case.merges != ("merge" in case.why)
    note(case.name, "about", method=case.method, oracle=case.oracle.NAME, why=dict(case.why))
