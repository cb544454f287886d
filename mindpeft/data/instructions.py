"""Conversations and plain texts to token ids and labels for a model of the next token."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from mindpeft.data.batching import IGNORE_INDEX, Feature
from mindpeft.data.chat_template import render_with_spans, template_text
from mindpeft.data.conversations import Conversation
from mindpeft.data.encoding import CHUNK, Features
from mindpeft.data.tokenization import Tokenizer
from mindpeft.errors import InputError


@dataclass(frozen=True)
class InstructionFormat:
    """How conversations become texts, and what of them is learnt.

    Attributes:
        template: Jinja text.
        train_on_prompt: learn all of it; else only what the assistant says.
    """

    template: str
    train_on_prompt: bool = False


def choose_template(tokenizer: Tokenizer, name: str | None) -> str:
    """The Jinja text of a named template, or of the tokenizer's own.

    Raises:
        InputError: an unknown name, or no name and the tokenizer has none.
    """
    if name is not None:
        return template_text(name)
    if tokenizer.chat_template is None:
        raise InputError(
            "the checkpoint has no chat template: choose one with data.template (alpaca does for base models)"
        )
    return tokenizer.chat_template


def encode_conversations(
    conversations: Sequence[Conversation],
    tokenizer: Tokenizer,
    form: InstructionFormat,
    max_length: int | None = None,
) -> Features:
    """Tokenise conversations.

    Args:
        conversations: see `read_conversations`.
        tokenizer: the model's.
        form: how they become texts.
        max_length: most tokens of a row; longer ones lose their end, and those of which nothing to learn is
            left are left out.

    Returns:
        Rows with ``input_ids``, ``attention_mask`` and ``labels``: the tokens to learn, -100 for others.

    Raises:
        InputError: the template refuses a conversation, or no row has anything to learn.
    """
    features = Features()
    for start in range(0, len(conversations), CHUNK):
        chunk = conversations[start : start + CHUNK]
        written = [_written(conversation, tokenizer, form) for conversation in chunk]
        encoding = tokenizer(
            [text for text, _ in written],
            truncation=False,
            add_special_tokens=False,  # the template writes them
            return_offsets_mapping=True,
        )
        rows = zip(encoding["input_ids"], encoding["offset_mapping"], written, strict=True)
        for ids, offsets, (text, spans) in rows:
            spans = [(0, len(text))] if form.train_on_prompt else spans
            _add(features, ids, _labels(ids, offsets, spans, text), max_length)
    if not features:
        raise InputError("nothing to learn is left: every conversation is cut before the assistant speaks")
    return features


def _written(
    conversation: Conversation, tokenizer: Tokenizer, form: InstructionFormat
) -> tuple[str, list[tuple[int, int]]]:
    try:
        text, spans = render_with_spans(form.template, conversation.messages, **tokenizer.template_variables)
    except InputError as error:
        where = "" if conversation.line is None else f"line {conversation.line}: "
        raise InputError(f"{where}{error}") from error
    end = tokenizer.special_tokens_map.get("eos_token")
    stripped = text.rstrip()
    if end and spans[-1][1] == len(stripped) and not stripped.endswith(tokenizer.added_tokens):
        # A model that lacks the template's own end of a turn would never learn to stop.
        text, spans = stripped + end, [*spans[:-1], (spans[-1][0], len(stripped + end))]
    return text, spans


def _labels(
    ids: list[int], offsets: list[tuple[int, int]], spans: list[tuple[int, int]], text: str
) -> list[int]:
    """The tokens that lie within the spans of characters but for white space behind, -100 for others."""
    starts = [start for start, _ in spans]
    labels = []
    for token, (first, last) in zip(ids, offsets, strict=True):
        span = bisect_right(starts, first) - 1
        end = spans[span][1] if span >= 0 else 0
        inside = first < end and first < last and not text[end:last].strip()
        labels.append(token if inside else IGNORE_INDEX)
    return labels


def _add(features: Features, ids: list[int], labels: list[int], max_length: int | None) -> None:
    """Add a row, cut to length."""
    if max_length is not None and len(ids) > max_length:
        ids, labels = ids[:max_length], labels[:max_length]
        features.truncated += 1
    labels = [IGNORE_INDEX, *labels[1:]]  # nothing comes before the first token
    if any(label != IGNORE_INDEX for label in labels):
        features.append(_row(ids, labels))


def _row(ids: list[int], labels: list[int]) -> Feature:
    return {"input_ids": ids, "attention_mask": [1] * len(ids), "labels": labels}


def encode_texts(texts: Sequence[str], tokenizer: Tokenizer, block: int) -> Features:
    """Plain texts, one behind the other with an end between them, cut into blocks of equal length.

    Args:
        texts: in order.
        tokenizer: the model's.
        block: tokens of a block; what is left over at the end is the last, shorter one.

    Returns:
        Rows with ``input_ids``, ``attention_mask`` and ``labels``, which are the tokens.
    """
    features = Features()
    for ids in _blocks(_stream(texts, tokenizer), block):
        if len(ids) > 1:
            features.append(_row(ids, [IGNORE_INDEX, *ids[1:]]))
    return features


def _stream(texts: Sequence[str], tokenizer: Tokenizer) -> Iterator[int]:
    eos = tokenizer.eos_token_id
    for start in range(0, len(texts), CHUNK):
        for ids in tokenizer(list(texts[start : start + CHUNK]), truncation=False)["input_ids"]:
            yield from ids
            if eos is not None and ids[-1:] != [eos]:
                yield eos


def _blocks(tokens: Iterator[int], block: int) -> Iterator[list[int]]:
    held: list[int] = []
    for token in tokens:
        held.append(token)
        if len(held) == block:
            yield held
            held = []
    if held:
        yield held
