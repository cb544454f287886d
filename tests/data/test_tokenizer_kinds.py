"""Byte-level and SentencePiece tokenizers, from their own model files, give transformers' tokens."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path

import pytest
import transformers

from mindpeft.data.sentencepiece_file import read_sentencepiece
from mindpeft.data.tokenization import AutoTokenizer
from mindpeft.errors import InputError

ODD = "😀😃👩‍👩‍👧‍👦🏳️‍🌈é ü ñ ﬁ ① ½ 中文 한국어 العربية  \t x   y 12345 3.14 don't I'LL"
LITERAL = [
    "  leading",
    "trailing  ",
    "a\u00a0b",
    "\u3000全角",
    "tab\tand",
    "new\nline\n\n",
    "<s> literal",
    "</s>",
]
LITERAL += ["<|im_start|>user\nhi<|im_end|>", "<|endoftext|>", "<unk>", ""]


@pytest.fixture(scope="module")
def texts(shared_dir) -> list[str]:
    """1,000 lines: English, Chinese, code, emoji and other signs, and special tokens written out."""
    data = shared_dir / "data"
    sources = {
        data / "sst2_small" / "train.tsv": 250,
        next((data / "chnsenticorp").glob("*.*sv")): 250,
        Path(__file__).parents[2] / "mindpeft" / "tuners" / "bank.py": 250,
    }
    draw, lines = random.Random(0), []
    for path, count in sources.items():
        found = [line for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
        draw.shuffle(found)
        lines += found[:count]
    lines += ["".join(draw.choice(ODD) for _ in range(draw.randint(3, 40))) for _ in range(250)]
    return [*lines, *LITERAL]


# Name -> the files to take from shared/ and what they are called, and the configuration.
KINDS = {
    "gpt2": ("gpt2", {"tokenizer.json": "tokenizer.json"}, None),
    "gpt2 merges": (
        "gpt2",
        {"vocab.json": "vocab.json", "merges.txt": "merges.txt"},
        {"tokenizer_class": "GPT2Tokenizer"},
    ),
    "qwen": ("qwen2_5", None, None),
    "t5": ("t5", None, None),
    "mistral": (
        "mistral",
        {"tokenizer.model.v1": "tokenizer.model"},
        {"tokenizer_class": "LlamaTokenizer", "add_bos_token": True},
    ),
    "mistral legacy": (
        "mistral",
        {"tokenizer.model.v3": "tokenizer.model"},
        {"tokenizer_class": "LlamaTokenizer", "add_bos_token": True, "add_eos_token": True, "legacy": True},
    ),
}


@pytest.fixture(scope="module", params=KINDS)
def folder(request, shared_dir, tmp_path_factory) -> Path:
    name, files, config = KINDS[request.param]
    source = shared_dir / "tokenizers" / name
    if files is None:
        return source
    folder = tmp_path_factory.mktemp("tokenizer")
    for old, new in files.items():
        shutil.copy(source / old, folder / new)
    if config is not None:
        (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


def test_tokens_of_a_thousand_lines(folder, texts, tmp_path):
    theirs, ours = transformers.AutoTokenizer.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    expected = theirs(texts)["input_ids"]
    assert ours(texts, truncation=False)["input_ids"] == expected
    pairs = (texts[::10], texts[1::10][: len(texts[::10])])
    pairs = [list(side) for side in zip(*zip(*pairs, strict=False), strict=True)]
    assert ours(*pairs, truncation=False)["input_ids"] == theirs(*pairs)["input_ids"]
    if not theirs.clean_up_tokenization_spaces:
        assert [ours.decode(ids) for ids in expected] == [theirs.decode(ids) for ids in expected]
    ours.save_pretrained(tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)(texts, truncation=False)["input_ids"]
    # The runtime reads the scores in a tokenizer.json to one ulp: equally likely pieces may change places.
    assert [sorted(ids) for ids in again] == [sorted(ids) for ids in expected]
    assert sum(ids != theirs for ids, theirs in zip(again, expected, strict=True)) <= 1
    for role in ("bos", "eos", "pad", "unk"):
        if ours.special_tokens_map.get(f"{role}_token") is not None:
            assert getattr(ours, f"{role}_token_id", None) == getattr(theirs, f"{role}_token_id")


def test_a_bare_model_file_begins_with_bos(shared_dir, tmp_path):
    """transformers drops it in silence where there is no tokenizer_config.json."""
    shutil.copy(shared_dir / "tokenizers" / "mistral" / "tokenizer.model.v1", tmp_path / "tokenizer.model")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    tokens = tokenizer("Hello world")["input_ids"]
    assert tokenizer.convert_ids_to_tokens(tokens) == ["<s>", "▁Hello", "▁world"]
    assert tokenizer.decode(tokens, skip_special_tokens=True) == "Hello world"


def test_broken_model_files(tmp_path, shared_dir):
    model = shared_dir / "tokenizers" / "mistral" / "tokenizer.model.v1"
    path = tmp_path / "tokenizer.model"
    for content, message in {
        b"": "it has no pieces",
        b"no model at all": "is not a SentencePiece model",
        model.read_bytes()[:1000]: "is not a SentencePiece model",
        b"\x0a\x03\x0a\x01a\x12\x02\x18\x03": "words or characters",
    }.items():
        path.write_bytes(content)
        with pytest.raises(InputError, match=message):
            read_sentencepiece(path)


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"vocab.json": "{", "merges.txt": ""}, "can't be used"),
        ({"vocab.json": '{"a": 0}', "merges.txt": "#version\na b"}, "can't be used"),
        (
            {
                "vocab.json": '{"a": 0}',
                "merges.txt": "",
                "tokenizer_config.json": '{"added_tokens_decoder": {"7": {"content": "<x>"}}}',
            },
            "'<x>' should be number 7",
        ),
        (
            {
                "vocab.json": '{"a": 0}',
                "merges.txt": "",
                "tokenizer_config.json": '{"added_tokens_decoder": {"one": {}}}',
            },
            "the added tokens are malformed",
        ),
    ],
    ids=["vocabulary", "merges", "place", "shape"],
)
def test_broken_vocabularies(tmp_path, files, message):
    for name, content in files.items():
        (tmp_path / name).write_text(content)
    with pytest.raises(InputError, match=message):
        AutoTokenizer.from_pretrained(tmp_path)


def test_a_folder_without_any(tmp_path):
    with pytest.raises(InputError, match=r"looked for tokenizer.json, vocab.txt, tokenizer.model"):
        AutoTokenizer.from_pretrained(tmp_path)
