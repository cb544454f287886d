"""What a trained model answers: labels with scores, from texts as they come."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import islice
from typing import Any, NamedTuple

import numpy as np

from mindpeft.cli.model_loading import check_max_length
from mindpeft.cli.run_folder import Run
from mindpeft.data.batching import BucketBatcher
from mindpeft.data.encoding import encode
from mindpeft.data.text_dataset import TextDataset, TextExample
from mindpeft.train.evaluation import evaluate
from mindpeft.train.metrics import IGNORE_INDEX
from mindpeft.train.runner import StepRunner

_CHUNKS = 8  # batches encoded at once
_SHORTEST = 16  # tokens of the shortest padded length; each further one is twice as long


class Text(NamedTuple):
    """A text to ask about, with its second text where the task has two."""

    text: str | list[str]
    text_pair: str | None = None


def answers(
    run: Run,
    texts: Iterable[Text],
    *,
    batch_size: int = 32,
    max_length: int | None = None,
    top_k: int | None = None,
) -> Iterator[dict[str, Any]]:
    """Answer texts in their order, some batches at a time.

    Args:
        run: a classifier or a regression.
        texts: for token classification, lists of words.
        batch_size: rows of a batch; a lonely few texts make a smaller one.
        max_length: most tokens of a text; what training used if None.
        top_k: also give the scores of that many labels, the best first.

    Yields:
        ``text`` (and ``text_pair``), and by task: ``label`` and ``score`` (a probability); ``labels``, those
        above one half with their scores; ``value``; or ``tokens``, a label and a score for each word (null
        for words that were cut).
    """
    run.require_labels("predict")
    tokenizer = run.tokenizer()
    asked = max_length or (run.data.max_length if run.data else None)
    limit = check_max_length(asked, run.model.config, tokenizer)
    runner, texts = StepRunner(run.model), iter(texts)
    run.model.set_train(False)
    while chunk := list(islice(texts, batch_size * _CHUNKS)):
        batch_size = min(batch_size, len(chunk)) if runner.eval_clock.calls == 0 else batch_size
        # A label on each word shows which token speaks for it.
        marks = [[0] * len(item.text) if isinstance(item.text, list) else None for item in chunk]
        examples = [TextExample(*item, label=mark) for item, mark in zip(chunk, marks, strict=True)]
        features = encode(TextDataset(examples, run.task, None, "input"), tokenizer, limit)
        longest = max(len(feature["input_ids"]) for feature in features)
        batches = BucketBatcher(
            features, batch_size, pad_token_id=tokenizer.pad_token_id or 0, buckets=_lengths(longest, limit)
        )
        output = evaluate(run.model, runner, batches, keep_logits=True)
        for row, item in enumerate(chunk):
            spoken = None if output.label_ids is None else output.label_ids[row] != IGNORE_INDEX
            yield _asked(item) | _answer(run, item, output.predictions[row], spoken, top_k)


def _lengths(longest: int, limit: int | None) -> list[int]:
    """Padded lengths that don't depend on the chunk, so that few graphs are compiled."""
    lengths = [_SHORTEST]
    while lengths[-1] < longest:
        lengths.append(lengths[-1] * 2)
    return sorted({min(length, limit or length) for length in lengths})


def _asked(item: Text) -> dict[str, Any]:
    text = " ".join(item.text) if isinstance(item.text, list) else item.text
    return {"text": text} if item.text_pair is None else {"text": text, "text_pair": item.text_pair}


def _answer(
    run: Run, item: Text, logits: np.ndarray, spoken: np.ndarray | None, top_k: int | None
) -> dict[str, Any]:
    if run.task == "regression":
        return {"value": _rounded(logits.reshape(-1)[0])}
    names = run.label_map.names
    if run.task == "token_classification":
        return {"tokens": _words(names, item.text, _softmax(logits[spoken]))}
    scores = 1 / (1 + np.exp(-logits)) if run.task == "multi_label_classification" else _softmax(logits)
    order = np.argsort(-scores, kind="stable")
    if run.task == "multi_label_classification":
        answer = {"labels": {names[index]: _rounded(scores[index]) for index in order if scores[index] > 0.5}}
    else:
        answer = {"label": names[order[0]], "score": _rounded(scores[order[0]])}
    if top_k is not None:
        answer["scores"] = {names[index]: _rounded(scores[index]) for index in order[:top_k]}
    return answer


def _words(names: tuple[str, ...], words: list[str], scores: np.ndarray) -> list[dict[str, Any]]:
    """One entry a word; those beyond the last one that fitted have no label."""
    tokens = []
    for index, word in enumerate(words):
        inside = index < len(scores)
        best = int(scores[index].argmax()) if inside else 0
        label, score = (names[best], _rounded(scores[index, best])) if inside else (None, None)
        tokens.append({"word": word, "label": label, "score": score})
    return tokens


def _softmax(logits: np.ndarray) -> np.ndarray:
    shifted = np.exp(logits - logits.max(-1, keepdims=True))
    return shifted / shifted.sum(-1, keepdims=True)


def _rounded(value: float) -> float:
    return round(float(value), 6)
