"""ChatGLM2's and ChatGLM3's tokenizer: a SentencePiece model with commands behind its pieces.

A folder holds ``tokenizer.model`` and a configuration that names the class. The rest stands in the code that
published checkpoints bring along; here it is said anew.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers, processors

from mindpeft.data.sentencepiece_file import SPACE, add_controls, is_bpe, pairs_of_bytes, read_sentencepiece
from mindpeft.errors import InputError

TOKENIZER_CLASS = "ChatGLMTokenizer"
PREFIX = ("[gMASK]", "sop")  # before every text
SPEAKERS = ("<|system|>", "<|user|>", "<|assistant|>", "<|observation|>")
COMMANDS = ("[MASK]", "[gMASK]", "[sMASK]", "sop", "eop", *SPEAKERS)  # numbered on behind the pieces
_TOKENS = {"unk": "<unk>", "pad": "<unk>", "eos": "</s>"}


def is_chatglm(config: dict[str, Any]) -> bool:
    """Whether a ``tokenizer_config.json`` is ChatGLM's."""
    return config.get("tokenizer_class") == TOKENIZER_CLASS


def backend_from_chatglm(path: Path) -> tuple[Tokenizer, dict[str, str]]:
    """The tokenizer of a model file, and its special tokens by role.

    Raises:
        InputError: it is no SentencePiece model of byte pairs, or has a command among its pieces.
    """
    model = read_sentencepiece(path)
    if not is_bpe(model):
        raise InputError(f"{path} is a SentencePiece model of unigrams; ChatGLM's are of byte pairs")
    backend = Tokenizer(pairs_of_bytes(model))
    # Unlike Metaspace this puts a space in front of what begins with one, as SentencePiece itself does.
    first = [normalizers.Prepend(SPACE)] if model.dummy_prefix else []
    backend.normalizer = normalizers.Sequence([*first, normalizers.Replace(" ", SPACE)])
    backend.decoder = _decoder(model.dummy_prefix)
    add_controls(backend, model)
    _add_commands(backend, path)
    _begin_with_prefix(backend)
    return backend, {role: token for role, token in _TOKENS.items() if backend.token_to_id(token) is not None}


def _add_commands(backend: Tokenizer, path: Path) -> None:
    pieces = backend.get_vocab_size()
    # Two of them are letters only: those count where they stand alone, not within "philosophy".
    tokens = [
        AddedToken(name, normalized=False, special=True, single_word=name.isalpha()) for name in COMMANDS
    ]
    backend.add_special_tokens(tokens)
    for number, name in enumerate(COMMANDS, pieces):
        if backend.token_to_id(name) != number:
            raise InputError(f"{path} has {name!r} among its pieces; ChatGLM's have no such")


def _begin_with_prefix(backend: Tokenizer) -> None:
    first = " ".join(f"{token}:0" for token in PREFIX)
    end = _TOKENS["eos"]
    backend.post_processor = processors.TemplateProcessing(
        single=f"{first} $A:0",
        pair=f"{first} $A:0 $B:0" + (f" {end}:0" if backend.token_to_id(end) is not None else ""),
        special_tokens=[
            (token, backend.token_to_id(token))
            for token in (*PREFIX, end)
            if backend.token_to_id(token) is not None
        ],
    )


def _decoder(dummy_prefix: bool) -> decoders.Decoder:
    """With the prefix every stretch of text behind a command begins with a space that is not the text's."""
    steps = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    if not dummy_prefix:
        return decoders.Sequence(steps)
    ends = [r"\[MASK\]", r"\[gMASK\]sop", r"\[sMASK\]", *(rf"<\|{name[2:-2]}\|>" for name in SPEAKERS)]
    behind = Regex("(?<=" + "|".join(ends) + ") ")
    return decoders.Sequence([*steps, decoders.Replace(behind, ""), decoders.Strip(content=" ", left=1)])


def as_general(config: dict[str, Any]) -> dict[str, Any]:
    """The configuration for a ``tokenizer.json``, which transformers opens without ChatGLM's own code."""
    kept = {key: value for key, value in config.items() if key not in ("auto_map", "added_tokens_decoder")}
    defaults = {"padding_side": "left", "model_input_names": ["input_ids", "attention_mask"]}
    return {**defaults, **kept, "tokenizer_class": "PreTrainedTokenizerFast"}
