"""SentencePiece models (``tokenizer.model``, ``spiece.model``) as tokenizers of the `tokenizers` library.

The file is a protocol buffer (sentencepiece_model.proto); the few fields that matter are read here.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, normalizers, pre_tokenizers, processors
from tokenizers.models import BPE, Unigram

from mindpeft.errors import InputError

SPACE = "\u2581"  # stands for a space in pieces
_UNIGRAM, _BPE = 1, 2  # kinds of model
_UNKNOWN, _CONTROL, _USER_DEFINED = 2, 3, 4  # kinds of pieces
_EXTRA_IDS = 100  # T5's, where the configuration is silent


@dataclass
class SentencePieceModel:
    """What is read of a file.

    Attributes:
        pieces: (text, score, kind).
        kind: 1 for unigrams, 2 for byte pair encoding.
        byte_fallback: characters that are in no piece become bytes.
        dummy_prefix: texts get a space in front.
        charsmap: the normalisation, in SentencePiece's compiled form.
    """

    pieces: list[tuple[str, float, int]] = field(default_factory=list)
    kind: int = _UNIGRAM
    byte_fallback: bool = False
    dummy_prefix: bool = True
    charsmap: bytes = b""

    @property
    def unknown(self) -> int:
        """The number of the unknown piece."""
        return next((i for i, (_, _, kind) in enumerate(self.pieces) if kind == _UNKNOWN), 0)


def read_sentencepiece(path: Path) -> SentencePieceModel:
    """Read a file.

    Raises:
        InputError: it is no SentencePiece model, or of a kind that has no counterpart.
    """
    model = SentencePieceModel()
    try:
        for number, value in _fields(path.read_bytes()):
            if number == 1:
                model.pieces.append(_piece(value))
            elif number == 2:
                trainer = dict(_fields(value))
                model.kind = trainer.get(3, _UNIGRAM)
                model.byte_fallback = bool(trainer.get(35, 0))
            elif number == 3:
                rules = dict(_fields(value))
                model.charsmap = bytes(rules.get(2, b""))
                model.dummy_prefix = bool(rules.get(3, 1))
    except (IndexError, ValueError, struct.error, TypeError, AttributeError) as error:
        raise InputError(f"{path} is not a SentencePiece model: {error}") from error
    if not model.pieces:
        raise InputError(f"{path} is not a SentencePiece model: it has no pieces")
    if model.kind not in (_UNIGRAM, _BPE):
        raise InputError(
            f"{path} is a SentencePiece model of words or characters; only BPE and unigrams are read"
        )
    return model


def _fields(data: bytes) -> Iterator[tuple[int, Any]]:
    """(number, value) of a message's fields: numbers, floats, or bytes."""
    at = 0
    while at < len(data):
        key, at = _varint(data, at)
        number, wire = key >> 3, key & 7
        if wire == 0:
            value, at = _varint(data, at)
        elif wire == 2:
            length, at = _varint(data, at)
            if at + length > len(data):
                raise ValueError("it ends within a field")
            value, at = data[at : at + length], at + length
        elif wire == 5:
            value, at = struct.unpack_from("<f", data, at)[0], at + 4
        elif wire == 1:
            value, at = struct.unpack_from("<d", data, at)[0], at + 8
        else:
            raise ValueError(f"a field of unknown type {wire}")
        yield number, value


def _varint(data: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[at]
        value |= (byte & 0x7F) << shift
        at, shift = at + 1, shift + 7
        if byte < 0x80:
            return value, at
        if shift > 63:
            raise ValueError("a number that is too long")


def _piece(data: bytes) -> tuple[str, float, int]:
    values = dict(_fields(data))
    return values[1].decode("utf-8") if 1 in values else "", values.get(2, 0.0), values.get(3, 1)


def backend_from_sentencepiece(path: Path, config: dict[str, Any]) -> tuple[Tokenizer, dict[str, str]]:
    """The tokenizer of a file, as Hugging Face's of Llama (byte pair encoding) or T5 (unigrams) is.

    Args:
        path: the file.
        config: ``tokenizer_config.json``; its ``legacy``, ``add_prefix_space``, ``add_bos_token``,
            ``add_eos_token`` and ``extra_ids`` count.

    Returns:
        The tokenizer, and its special tokens by role where the configuration names none.
    """
    model = read_sentencepiece(path)
    return (_like_llama if is_bpe(model) else _like_t5)(model, config)


def is_bpe(model: SentencePieceModel) -> bool:
    """Whether texts are put together by byte pair encoding; else by the likeliest unigrams."""
    return model.kind == _BPE


def pairs_of_bytes(model: SentencePieceModel) -> BPE:
    """The pieces as byte pair encoding of the `tokenizers` library."""
    vocabulary = {text: number for number, (text, _, _) in enumerate(model.pieces)}
    unknown = model.pieces[model.unknown][0]
    return BPE(
        vocabulary, merges_of(vocabulary), unk_token=unknown, fuse_unk=True, byte_fallback=model.byte_fallback
    )


def _like_llama(model: SentencePieceModel, config: dict[str, Any]) -> tuple[Tokenizer, dict[str, str]]:
    backend = Tokenizer(pairs_of_bytes(model))
    prefix = config.get("add_prefix_space")
    prefix = model.dummy_prefix if prefix is None else prefix
    scheme = ("always" if config.get("legacy") else "first") if prefix else "never"
    backend.pre_tokenizer = pre_tokenizers.Metaspace(replacement=SPACE, prepend_scheme=scheme, split=False)
    steps = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    backend.decoder = decoders.Sequence(steps + [decoders.Strip(content=" ", left=1)] * bool(prefix))
    add_controls(backend, model)
    tokens = {"unk": model.pieces[model.unknown][0], "bos": "<s>", "eos": "</s>"}
    return backend, {role: token for role, token in tokens.items() if backend.token_to_id(token) is not None}


def _like_t5(model: SentencePieceModel, config: dict[str, Any]) -> tuple[Tokenizer, dict[str, str]]:
    pieces = [(text, score) for text, score, _ in model.pieces]
    backend = Tokenizer(Unigram(pieces, unk_id=model.unknown, byte_fallback=model.byte_fallback))
    if model.charsmap:
        backend.normalizer = normalizers.Precompiled(model.charsmap)
    marks = pre_tokenizers.Metaspace(replacement=SPACE, prepend_scheme="always", split=True)
    backend.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), marks])
    backend.decoder = decoders.Metaspace(replacement=SPACE, prepend_scheme="always", split=True)
    add_controls(backend, model)
    extra = config.get("extra_ids", _EXTRA_IDS)
    names = [f"<extra_id_{number}>" for number in reversed(range(extra))]
    backend.add_special_tokens([AddedToken(name, normalized=False) for name in names])
    tokens = {"pad": "<pad>", "eos": "</s>", "unk": model.pieces[model.unknown][0]}
    return backend, {role: token for role, token in tokens.items() if backend.token_to_id(token) is not None}


def add_controls(backend: Tokenizer, model: SentencePieceModel) -> None:
    """Let the pieces that stand for themselves be found in texts as they are written."""
    for text, _, kind in model.pieces:
        if kind == _CONTROL:
            backend.add_special_tokens([AddedToken(text, normalized=False, special=True)])
        elif kind == _USER_DEFINED:
            backend.add_tokens([AddedToken(text, normalized=False, special=False)])


def merges_of(vocabulary: dict[str, int]) -> list[tuple[str, str]]:
    """The merges of byte pair encoding that lead to these pieces, the earlier pieces' first."""
    merges = []
    for text in vocabulary:
        halves = ((text[:at], text[at:]) for at in range(1, len(text)))
        found = [pair for pair in halves if pair[0] in vocabulary and pair[1] in vocabulary]
        merges += sorted(found, key=lambda pair: (vocabulary[pair[0]], vocabulary[pair[1]]))
    return sorted(merges, key=lambda pair: (vocabulary[pair[0] + pair[1]], len(pair[0]), len(pair[1])))


def add_bos_and_eos(backend: Tokenizer, tokens: dict[str, str], first: bool, last: bool) -> None:
    """Let every text begin with ``bos`` and end with ``eos``, as asked for."""
    bos = [tokens["bos"]] if first and "bos" in tokens else []
    eos = [tokens["eos"]] if last and "eos" in tokens else []
    if not bos and not eos:
        return
    single = [*(f"{token}:0" for token in bos), "$A:0", *(f"{token}:0" for token in eos)]
    pair = [*single, *(f"{token}:1" for token in bos), "$B:1", *(f"{token}:1" for token in eos)]
    backend.post_processor = processors.TemplateProcessing(
        single=" ".join(single),
        pair=" ".join(pair),
        special_tokens=[(token, backend.token_to_id(token)) for token in {*bos, *eos}],
    )
