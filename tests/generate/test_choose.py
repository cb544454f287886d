"""Scores after penalties and filters against transformers' processors, and draws against probabilities."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.stats import chisquare
from transformers.generation import logits_process as theirs

from mindpeft.generate.choose import Chooser, log_softmax
from mindpeft.generate.config import GenerationConfig

VOCABULARY = 50
LOGITS = np.random.default_rng(0).normal(0, 3, (4, VOCABULARY)).astype(np.float32)
PROMPTS = np.random.default_rng(1).integers(0, VOCABULARY, (4, 6))


def chooser(**settings) -> Chooser:
    return Chooser(GenerationConfig(seed=0, **settings), PROMPTS, np.ones(PROMPTS.shape, bool))


FILTERS = {
    "temperature": ({"temperature": 0.6}, theirs.TemperatureLogitsWarper(0.6)),
    "top_k": ({"top_k": 7}, theirs.TopKLogitsWarper(7)),
    "top_k of one": ({"top_k": 1}, theirs.TopKLogitsWarper(1)),
    "top_p": ({"top_p": 0.8}, theirs.TopPLogitsWarper(0.8)),
    "top_p of one": ({"top_p": 1e-6}, theirs.TopPLogitsWarper(1e-6)),
    "min_p": ({"min_p": 0.1}, theirs.MinPLogitsWarper(0.1)),
}


@pytest.mark.parametrize(("settings", "processor"), FILTERS.values(), ids=FILTERS)
def test_filters(settings, processor):
    found = chooser(do_sample=True, **{"top_k": 0, **settings}).processed(LOGITS, PROMPTS[:, :0])
    expected = processor(torch.tensor(PROMPTS), torch.tensor(LOGITS)).numpy()
    np.testing.assert_array_equal(np.isinf(found), np.isinf(expected))
    np.testing.assert_allclose(found, expected, rtol=1e-6)


def test_filters_one_after_another():
    settings = {"temperature": 1.7, "top_k": 20, "top_p": 0.9, "min_p": 0.02, "repetition_penalty": 1.3}
    written = PROMPTS[:, 3:]
    prompts = PROMPTS[:, :3]
    ours = Chooser(
        GenerationConfig(do_sample=True, seed=0, **settings), prompts, np.ones(prompts.shape, bool)
    )
    scores = torch.tensor(LOGITS)
    for processor in (
        theirs.RepetitionPenaltyLogitsProcessor(1.3),
        theirs.TemperatureLogitsWarper(1.7),
        theirs.TopKLogitsWarper(20),
        theirs.TopPLogitsWarper(0.9),
        theirs.MinPLogitsWarper(0.02),
    ):
        scores = processor(torch.tensor(PROMPTS), scores)
    np.testing.assert_allclose(ours.processed(LOGITS, written), scores.numpy(), rtol=1e-6)


def test_draws_follow_the_probabilities_of_transformers():
    """10,000 draws by top-p against transformers' probabilities: chi-square."""
    ours = chooser(do_sample=True, top_k=0, top_p=0.9)
    expected = torch.softmax(
        theirs.TopPLogitsWarper(0.9)(torch.tensor(PROMPTS[:1]), torch.tensor(LOGITS[:1])).double(), -1
    ).numpy()[0]
    rows = np.repeat(LOGITS[:1], 10_000, 0)
    many = Chooser(ours.config, np.repeat(PROMPTS[:1], 10_000, 0), np.ones((10_000, 6), bool))
    drawn = many.next_tokens(rows, np.zeros((10_000, 0), int))
    counts = np.bincount(drawn, minlength=VOCABULARY)
    assert counts[expected == 0].sum() == 0
    possible = expected > 0
    frequent = possible & (expected * 10_000 >= 5)
    observed = np.append(counts[frequent], counts[possible & ~frequent].sum())
    wanted = np.append(expected[frequent], expected[possible & ~frequent].sum()) * 10_000
    keep = wanted > 0
    assert chisquare(observed[keep], wanted[keep] * observed.sum() / wanted.sum()).pvalue > 1e-3


def test_presence_penalty_and_the_least_length():
    ours = chooser(presence_penalty=2.5, min_new_tokens=3, eos_token_id=[4, 9])
    written = np.array([[1, 1], [2, 3], [4, 4], [5, 6]])
    found = ours.processed(LOGITS, written)
    assert np.isinf(found[:, [4, 9]]).all()
    assert found[0, 1] == LOGITS[0, 1] - np.float32(2.5)
    assert found[1, 2] == LOGITS[1, 2] - np.float32(2.5)
    assert found[0, 2] == LOGITS[0, 2]
    assert not np.isinf(ours.processed(LOGITS, np.ones((4, 3), int))[:, 4]).any()


def test_padding_of_a_prompt_is_not_repeated():
    real = np.ones(PROMPTS.shape, bool)
    real[:, 0] = False
    ours = Chooser(GenerationConfig(repetition_penalty=3.0, seed=0), PROMPTS, real)
    found = ours.processed(LOGITS, PROMPTS[:, :0])
    for row in range(4):
        untouched = set(range(VOCABULARY)) - set(PROMPTS[row, 1:].tolist())
        assert all(found[row, token] == LOGITS[row, token] for token in untouched)


def test_several_different_tokens():
    drawn = chooser(do_sample=True).pick(LOGITS, 10)
    assert all(len(set(row)) == 10 for row in drawn.tolist())
    best = chooser().pick(LOGITS, 3)
    np.testing.assert_array_equal(best, np.argsort(-LOGITS, -1)[:, :3])


def test_log_softmax():
    np.testing.assert_allclose(
        log_softmax(LOGITS), torch.log_softmax(torch.tensor(LOGITS), -1).numpy(), atol=1e-5
    )
