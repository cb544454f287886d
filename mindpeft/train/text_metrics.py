"""How near written texts come to those that were wanted: exact match, ROUGE, BLEU."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any

from mindpeft.errors import InputError

Texts = Sequence[str]
# Chinese, Japanese and Korean are compared by character, other languages by word.
_UNITS = re.compile(r"[\u2e80-\u9fff\uac00-\ud7af\uf900-\ufaff\uff00-\uffef]|[^\W_]+")
_CHINESE = re.compile(r"[\u4e00-\u9fff]")


def exact_match(written: Texts, wanted: Texts) -> dict[str, float]:
    """The share of texts that are the wanted ones but for white space at both ends."""
    same = sum(a.strip() == b.strip() for a, b in zip(written, wanted, strict=True))
    return {"exact_match": same / len(wanted)}


class _Units:
    """What rouge_score takes for a tokenizer."""

    def tokenize(self, text: str) -> list[str]:
        return _UNITS.findall(text.lower())


def rouge(written: Texts, wanted: Texts) -> dict[str, float]:
    """Mean F1 of ROUGE-1, ROUGE-2 and ROUGE-L (Lin, 2004), by the rouge-score package."""
    scorer = _imported("rouge_score.rouge_scorer").RougeScorer(
        ["rouge1", "rouge2", "rougeL"], tokenizer=_Units()
    )
    found = [scorer.score(target, text) for text, target in zip(written, wanted, strict=True)]
    return {name: sum(score[name].fmeasure for score in found) / len(found) for name in found[0]}


def bleu(written: Texts, wanted: Texts) -> dict[str, float]:
    """Corpus BLEU (Papineni et al., 2002) from 0 to 100, by the sacrebleu package."""
    chinese = any(_CHINESE.search(text) for text in wanted)
    score = _imported("sacrebleu").corpus_bleu(
        list(written), [list(wanted)], tokenize="zh" if chinese else "13a"
    )
    return {"bleu": score.score}


TEXT_METRICS: dict[str, Callable[[Texts, Texts], dict[str, float]]] = {
    "exact_match": exact_match,
    "rouge": rouge,
    "bleu": bleu,
}


def _imported(name: str) -> Any:
    import importlib

    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise InputError(
            f"this metric needs a package more: pip install 'mindpeft[text]' ({error})"
        ) from error
