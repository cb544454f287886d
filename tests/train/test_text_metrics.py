"""How near written texts come: known values, and the packages' own."""

from __future__ import annotations

import pytest
from rouge_score import rouge_scorer
from sacrebleu import corpus_bleu

from mindpeft.errors import InputError
from mindpeft.train import text_metrics
from mindpeft.train.text_metrics import bleu, exact_match, rouge

WRITTEN = ["the cat sat on the mat", "a dog", "it is raining"]
WANTED = ["the cat lay on the mat", "a dog", "the sun is out"]


def test_exact_match():
    assert exact_match([" a\n", "b", "C"], ["a", "c", "c"]) == {"exact_match": pytest.approx(1 / 3)}


def test_rouge_of_english_is_the_packages_own():
    found = rouge(WRITTEN, WANTED)
    scorer = rouge_scorer.RougeScorer(list(found))
    for name, value in found.items():
        scores = [scorer.score(b, a)[name].fmeasure for a, b in zip(WRITTEN, WANTED, strict=True)]
        assert value == pytest.approx(sum(scores) / 3)


def test_rouge_of_chinese_goes_by_character():
    found = rouge(["今天下雨"], ["今天晴朗"])
    assert found["rouge1"] == pytest.approx(0.5)
    assert found["rouge2"] == pytest.approx(1 / 3)


def test_bleu():
    assert bleu(WRITTEN, WANTED)["bleu"] == pytest.approx(corpus_bleu(WRITTEN, [WANTED]).score)
    assert bleu(["今天天气很好"], ["今天天气很好"])["bleu"] == pytest.approx(100)


def test_a_missing_package_is_named():
    with pytest.raises(InputError, match=r"pip install 'mindpeft\[text\]'"):
        text_metrics._imported("no_such_package_at_all")
