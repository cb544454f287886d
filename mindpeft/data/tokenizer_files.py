"""Tokenizer folders of Hugging Face, in and out.

``tokenizer.json`` says all; without it BERT's ``vocab.txt``, a SentencePiece model, or GPT-2's and Qwen's
``vocab.json`` with ``merges.txt`` do, together with what ``tokenizer_config.json`` adds.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers, pre_tokenizers, processors
from tokenizers.models import BPE, WordPiece

from mindpeft.data.chatglm_tokenizer import COMMANDS, as_general, backend_from_chatglm, is_chatglm
from mindpeft.data.sentencepiece_file import add_bos_and_eos, backend_from_sentencepiece
from mindpeft.errors import InputError
from mindpeft.files import atomic_write, read_json, write_json

ROLES = ("unk", "sep", "pad", "cls", "mask", "bos", "eos")
WORDPIECE_TOKENS = {"unk": "[UNK]", "sep": "[SEP]", "pad": "[PAD]", "cls": "[CLS]", "mask": "[MASK]"}
SENTENCEPIECE_FILES = ("tokenizer.model", "spiece.model", "sentencepiece.bpe.model")
LOOKED_FOR = ("tokenizer.json", "vocab.txt", *SENTENCEPIECE_FILES, "vocab.json with merges.txt")
CHAT_TEMPLATE_FILE = "chat_template.jinja"
# How Qwen2 and later cut texts into words before byte pair encoding; GPT-2's way is built in.
_QWEN_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
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
        chat_template: Jinja text, None if there is none.
    """

    backend: Tokenizer
    config: dict[str, Any] = field(default_factory=dict)
    special_tokens: dict[str, str] = field(default_factory=dict)
    chat_template: str | None = None

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
    backend, tokens = _read_backend(folder, config, tokens)
    backend.no_truncation()
    backend.no_padding()
    known = {role: token for role, token in tokens.items() if backend.token_to_id(token) is not None}
    backend.add_special_tokens(list(known.values()))
    config = as_general(config) if is_chatglm(config) else config
    return TokenizerFiles(backend, config, known, _chat_template(folder, config))


def _read_backend(
    folder: Path, config: dict[str, Any], tokens: dict[str, str]
) -> tuple[Tokenizer, dict[str, str]]:
    """The tokenizer, and the special tokens with those that its kind has by default."""
    sentencepiece = next((folder / name for name in SENTENCEPIECE_FILES if (folder / name).is_file()), None)
    if (folder / "tokenizer.json").is_file():
        backend = _backend_from_json(folder / "tokenizer.json", config)
        defaults = WORDPIECE_TOKENS if isinstance(backend.model, WordPiece) else {}
        return backend, {**defaults, **tokens}
    if (folder / "vocab.txt").is_file():
        tokens = {**WORDPIECE_TOKENS, **tokens}
        return _backend_from_vocab(folder / "vocab.txt", config, tokens), tokens
    if sentencepiece is not None:
        return _backend_from_pieces(sentencepiece, config, tokens)
    if (folder / "vocab.json").is_file() and (folder / "merges.txt").is_file():
        return _backend_from_merges(folder, config, tokens)
    raise InputError(f"no tokenizer in {folder}: looked for {', '.join(LOOKED_FOR)}")


def _chat_template(folder: Path, config: dict[str, Any]) -> str | None:
    """A file of its own, or the configuration's; of several named ones the one called "default"."""
    path = folder / CHAT_TEMPLATE_FILE
    if path.is_file():
        return path.read_text(encoding="utf-8")
    found = config.get("chat_template")
    if isinstance(found, list):
        named = {entry.get("name"): entry.get("template") for entry in found if isinstance(entry, dict)}
        found = named.get("default")
    return found if isinstance(found, str) else None


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
    if files.chat_template is not None and "chat_template" not in config:
        with atomic_write(folder / CHAT_TEMPLATE_FILE, "w") as file:
            file.write(files.chat_template)


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


def _backend_from_pieces(
    path: Path, config: dict[str, Any], tokens: dict[str, str]
) -> tuple[Tokenizer, dict[str, str]]:
    """A SentencePiece model; a text of byte pairs begins with ``bos``, one of unigrams ends in ``eos``."""
    if is_chatglm(config):
        backend, defaults = backend_from_chatglm(path)
        _add_tokens(backend, config, path.parent, known=COMMANDS)
        return backend, {**defaults, **tokens}
    backend, defaults = backend_from_sentencepiece(path, config)
    tokens = {**defaults, **tokens}
    _add_tokens(backend, config, path.parent)
    is_bpe = isinstance(backend.model, BPE)
    first, last = config.get("add_bos_token", is_bpe), config.get("add_eos_token", not is_bpe)
    add_bos_and_eos(backend, tokens, bool(first), bool(last))
    return backend, tokens


def _backend_from_merges(
    folder: Path, config: dict[str, Any], tokens: dict[str, str]
) -> tuple[Tokenizer, dict[str, str]]:
    """Byte-level byte pair encoding as GPT-2 has it, or as Qwen does."""
    try:
        model = BPE.from_file(str(folder / "vocab.json"), str(folder / "merges.txt"))
    except Exception as error:  # the Rust side raises plain Exception
        raise InputError(f"{folder}: vocab.json and merges.txt can't be used: {error}") from error
    backend = Tokenizer(model)
    backend.decoder = decoders.ByteLevel()
    prefix = bool(config.get("add_prefix_space"))
    if str(config.get("tokenizer_class", "")).startswith("Qwen"):
        words = pre_tokenizers.Split(Regex(_QWEN_WORDS), "isolated")
        marks = pre_tokenizers.ByteLevel(add_prefix_space=prefix, use_regex=False)
        backend.normalizer = normalizers.NFC()
        backend.pre_tokenizer = pre_tokenizers.Sequence([words, marks])
    else:
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=prefix)
    _add_tokens(backend, config, folder)
    end = "<|endoftext|>"
    if not tokens and backend.token_to_id(end) is not None:
        tokens = {"unk": end, "bos": end, "eos": end}
    add_bos_and_eos(backend, tokens, bool(config.get("add_bos_token")), bool(config.get("add_eos_token")))
    return backend, tokens


def _add_tokens(
    backend: Tokenizer, config: dict[str, Any], folder: Path, known: Collection[str] = ()
) -> None:
    """Add what the configuration, or ``added_tokens.json``, has beside the vocabulary, in order of number."""
    listed = config.get("added_tokens_decoder") or {}
    flags = ("lstrip", "rstrip", "single_word", "normalized", "special")
    try:
        entries = [
            (int(number), AddedToken(entry["content"], **{key: bool(entry.get(key)) for key in flags}))
            for number, entry in listed.items()
        ]
        older = _optional_object(folder / "added_tokens.json")
        named = {token.content for _, token in entries}
        entries += [
            (int(number), AddedToken(text, normalized=False, special=True))
            for text, number in older.items()
            if text not in named
        ]
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise InputError(f"{folder}: the added tokens are malformed: {error!r}") from error
    entries = [entry for entry in entries if entry[1].content not in known]
    for number, token in sorted(entries, key=lambda entry: entry[0]):
        (backend.add_special_tokens if token.special else backend.add_tokens)([token])
        if backend.token_to_id(token.content) != number:
            raise InputError(
                f"{folder}: the added token {token.content!r} should be number {number}, but the vocabulary "
                f"gives it {backend.token_to_id(token.content)}"
            )
