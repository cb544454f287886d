"""Tokenizer folders of Hugging Face, in and out: ``tokenizer.json``, or BERT's ``vocab.txt`` alone."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, normalizers, pre_tokenizers, processors
from tokenizers.models import WordPiece

from mindpeft.errors import InputError
from mindpeft.files import atomic_write, read_json, write_json

ROLES = ("unk", "sep", "pad", "cls", "mask", "bos", "eos")
WORDPIECE_TOKENS = {"unk": "[UNK]", "sep": "[SEP]", "pad": "[PAD]", "cls": "[CLS]", "mask": "[MASK]"}
LOOKED_FOR = ("tokenizer.json", "vocab.txt")
# tokenizer_config.json's key -> BertNormalizer's attribute, and what holds when the file is silent
NORMALIZER_KEYS = {
    "do_lower_case": ("lowercase", True),
    "tokenize_chinese_chars": ("handle_chinese_chars", True),
    "strip_accents": ("strip_accents", None),
}


@dataclass(frozen=True)
class TokenizerFiles:
    """What a folder says about its tokenizer.

    Attributes:
        backend: the Rust tokenizer, with no truncation and no padding switched on.
        config: the contents of ``tokenizer_config.json``, ``{}`` if there is none.
        special_tokens: role (``"cls"``, ``"pad"``...) -> token.
    """

    backend: Tokenizer
    config: dict[str, Any] = field(default_factory=dict)
    special_tokens: dict[str, str] = field(default_factory=dict)

    @property
    def is_wordpiece(self) -> bool:
        """Whether this is BERT's kind of tokenizer, which names its tokens and types by default."""
        return isinstance(self.backend.model, WordPiece)


def read_tokenizer_folder(folder: Path) -> TokenizerFiles:
    """Read the tokenizer of ``folder``: ``tokenizer.json`` if it is there, else ``vocab.txt``.

    Raises:
        InputError: no such folder, no tokenizer in it, or a file that can't be used.
    """
    if not folder.is_dir():
        raise InputError(f"no such tokenizer folder: {folder}")
    config = _optional_object(folder / "tokenizer_config.json")
    tokens = _special_tokens(config, _optional_object(folder / "special_tokens_map.json"))
    if (folder / "tokenizer.json").is_file():
        backend = _backend_from_json(folder / "tokenizer.json", config)
    elif (folder / "vocab.txt").is_file():
        tokens = {**WORDPIECE_TOKENS, **tokens}
        backend = _backend_from_vocab(folder / "vocab.txt", config, tokens)
    else:
        raise InputError(f"no tokenizer in {folder}: looked for {' and '.join(LOOKED_FOR)}")
    backend.no_truncation()
    backend.no_padding()
    if isinstance(backend.model, WordPiece):
        tokens = {**WORDPIECE_TOKENS, **tokens}
    known = {role: token for role, token in tokens.items() if backend.token_to_id(token) is not None}
    backend.add_special_tokens(list(known.values()))
    return TokenizerFiles(backend, config, known)


def write_tokenizer_folder(files: TokenizerFiles, folder: Path) -> None:
    """Write ``tokenizer.json`` and ``tokenizer_config.json`` into ``folder``."""
    serialised = Tokenizer.from_str(files.backend.to_str())
    serialised.no_truncation()
    serialised.no_padding()
    with atomic_write(folder / "tokenizer.json", "w") as file:
        file.write(serialised.to_str(pretty=True))
    config = {f"{role}_token": token for role, token in files.special_tokens.items()} | files.config
    if files.is_wordpiece:
        config = {"tokenizer_class": "BertTokenizer"} | config
    write_json(folder / "tokenizer_config.json", config)


def _optional_object(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    value = read_json(path)
    if not isinstance(value, dict):
        raise InputError(f"{path} must hold a JSON object, not a {type(value).__name__}")
    return value


def _special_tokens(*sources: dict[str, Any]) -> dict[str, str]:
    """Role -> token; the first source that names a role wins, and a token may be text or an object."""
    tokens = {}
    for role in ROLES:
        for source in sources:
            token = source.get(f"{role}_token")
            token = token.get("content") if isinstance(token, dict) else token
            if isinstance(token, str):
                tokens[role] = token
                break
    return tokens


def _backend_from_json(path: Path, config: dict[str, Any]) -> Tokenizer:
    try:
        backend = Tokenizer.from_str(path.read_text(encoding="utf-8"))
    except Exception as error:  # the Rust side raises plain Exception for every kind of bad content
        raise InputError(f"{path} is not a usable tokenizer.json: {error}") from error
    if isinstance(backend.normalizer, normalizers.BertNormalizer):
        # tokenizer_config.json has the last word, as in transformers
        for key, (attribute, _) in NORMALIZER_KEYS.items():
            if key in config:
                setattr(backend.normalizer, attribute, config[key])
    return backend


def _backend_from_vocab(path: Path, config: dict[str, Any], tokens: dict[str, str]) -> Tokenizer:
    vocab = _read_vocab(path)
    for role in ("unk", "cls", "sep", "pad"):
        if tokens[role] not in vocab:
            raise InputError(f"{path} has no {role} token {tokens[role]!r} among its {len(vocab)} lines")
    backend = Tokenizer(WordPiece(vocab, unk_token=tokens["unk"]))
    settings = {name: config.get(key, default) for key, (name, default) in NORMALIZER_KEYS.items()}
    backend.normalizer = normalizers.BertNormalizer(clean_text=True, **settings)
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.decoder = decoders.WordPiece(prefix="##")
    cls, sep = tokens["cls"], tokens["sep"]
    backend.post_processor = processors.TemplateProcessing(
        single=f"{cls}:0 $A:0 {sep}:0",
        pair=f"{cls}:0 $A:0 {sep}:0 $B:1 {sep}:1",
        special_tokens=[(cls, vocab[cls]), (sep, vocab[sep])],
    )
    return backend


def _read_vocab(path: Path) -> dict[str, int]:
    """Token -> line index, by the reader that transformers uses: trailing white space is no part of it."""
    try:
        return WordPiece.read_file(str(path))
    except Exception as error:  # the Rust side raises plain Exception
        raise InputError(f"{path} is not a usable vocab.txt: {error}") from error
