"""The tokenizer equals transformers', and says clearly what is wrong with a folder or an option."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import transformers

from mindpeft.data.tokenization import AutoTokenizer
from mindpeft.errors import InputError

NAMES = ("minilm", "bert_base_uncased", "bert_base_chinese")


def reference(folder: Path):
    """transformers' tokenizer of a folder (a bare vocab.txt has no config that AutoTokenizer could go by)."""
    if (folder / "tokenizer.json").exists():
        return transformers.AutoTokenizer.from_pretrained(folder)
    return transformers.BertTokenizer.from_pretrained(folder)


@pytest.fixture(scope="module", params=NAMES)
def folder(request) -> Path:
    if request.param == "minilm":
        return request.getfixturevalue("minilm_dir")
    return request.getfixturevalue("shared_dir") / "tokenizers" / request.param


@pytest.fixture(scope="module")
def both(folder):
    return AutoTokenizer.from_pretrained(folder), reference(folder)


@pytest.fixture(scope="module")
def minilm(minilm_dir):
    return AutoTokenizer.from_pretrained(minilm_dir)


@pytest.fixture
def small_vocab(tmp_path) -> Path:
    """A folder with a tiny vocab.txt and nothing else."""
    words = "[PAD] [UNK] [CLS] [SEP] [MASK] hello world ##s Hello café cafe 你 好 你好 é "
    (tmp_path / "vocab.txt").write_text(words.replace(" ", "\n"), encoding="utf-8")
    return tmp_path


@pytest.mark.parametrize("special", [True, False])
@pytest.mark.parametrize("max_length", [None, 16, 128])
def test_single_texts(both, lines, max_length, special):
    ours, theirs = both
    options = {"max_length": max_length, "add_special_tokens": special, "return_offsets_mapping": True}
    got = ours(lines, truncation=max_length is not None, **options)
    expected = theirs(lines, truncation=max_length is not None, **options)
    assert dict(got) == dict(expected)


@pytest.mark.parametrize("truncation", ["longest_first", "only_first", "only_second"])
def test_pairs(both, lines, truncation):
    ours, theirs = both
    if truncation == "longest_first":
        firsts, seconds = lines, [*lines[7:], *lines[:7]]
    else:  # the other side must fit
        firsts, seconds = ["a short one", "word " * 300], ["word " * 300, "a short one"]
        keep = 1 if truncation == "only_first" else 0
        firsts, seconds = [firsts[keep]], [seconds[keep]]
    got = ours(firsts, seconds, max_length=32, truncation=truncation)
    assert dict(got) == dict(theirs(firsts, seconds, max_length=32, truncation=truncation))


@pytest.mark.parametrize("padding", [True, "longest", "max_length"])
def test_padding(both, lines, padding):
    ours, theirs = both
    got = ours(lines[:40], max_length=24, padding=padding)
    assert dict(got) == dict(theirs(lines[:40], max_length=24, padding=padding, truncation=True))


def test_one_text_gives_flat_lists(both):
    ours, theirs = both
    assert dict(ours("hello 世界")) == dict(theirs("hello 世界"))
    assert dict(ours("hello", "世界")) == dict(theirs("hello", "世界"))
    assert ours([])["input_ids"] == []


def test_words_given(both, lines):
    ours, theirs = both
    rows = [line.split(" ") for line in lines[30:80]] + [["", "a", "", "模型"], list("我爱北京")]
    got = ours(rows, is_split_into_words=True, max_length=40)
    expected = theirs(rows, is_split_into_words=True, max_length=40, truncation=True)
    assert dict(got) == dict(expected)
    for index in range(len(rows)):
        assert got.word_ids(index) == expected.word_ids(index)
    assert ours(["one", "row"], is_split_into_words=True)["input_ids"] == ours("one row")["input_ids"]


def test_decoding(both, lines):
    ours, theirs = both
    ids = theirs(lines)["input_ids"]
    for skip in (False, True):
        assert ours.batch_decode(ids, skip_special_tokens=skip) == theirs.batch_decode(
            ids, skip_special_tokens=skip
        )
    assert ours.convert_ids_to_tokens(ids[8]) == theirs.convert_ids_to_tokens(ids[8])
    assert ours.decode(ids[8][1]) == theirs.decode(ids[8][1])


def test_vocabulary_and_special_ids(both):
    ours, theirs = both
    assert ours.vocab_size == theirs.vocab_size
    assert len(ours) == len(theirs)
    assert ours.get_vocab() == theirs.get_vocab()
    for name in ("pad", "cls", "sep", "mask", "unk", "bos", "eos"):
        assert getattr(ours, f"{name}_token_id") == getattr(theirs, f"{name}_token_id")
    assert ours.all_special_ids == sorted(theirs.all_special_ids)
    assert ours.convert_tokens_to_ids(["hello", "nosuchtoken"]) == theirs.convert_tokens_to_ids(
        ["hello", "nosuchtoken"]
    )
    assert ours.tokenize("unaffable 模型") == theirs.tokenize("unaffable 模型")


def test_save_opens_in_transformers(folder, tmp_path, lines):
    ours = AutoTokenizer.from_pretrained(folder)
    ours(lines[:2], max_length=8, padding="max_length")  # the last call's settings must not be saved
    ours.save_pretrained(tmp_path / "saved")
    again = transformers.AutoTokenizer.from_pretrained(tmp_path / "saved")
    assert dict(again(lines)) == dict(reference(folder)(lines))
    assert dict(AutoTokenizer.from_pretrained(tmp_path / "saved")(lines, truncation=False)) == dict(
        again(lines)
    )


def test_baked_truncation_is_off(minilm):
    assert len(minilm("word " * 300, truncation=False)["input_ids"]) == 302
    assert len(minilm("word " * 900)["input_ids"]) == 512  # model_max_length
    assert len(minilm("word")["input_ids"]) == 3


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"do_lower_case": False},
        {"do_lower_case": False, "strip_accents": True},
        {"do_lower_case": True, "strip_accents": False},
        {"tokenize_chinese_chars": False},
        {"cls_token": "hello", "sep_token": {"content": "world", "__type": "AddedToken"}},
        {"model_input_names": ["input_ids", "attention_mask"], "model_max_length": 6},
        {"padding_side": "left", "truncation_side": "left"},
    ],
)
def test_vocab_alone_honours_the_config(small_vocab, config):
    if config:
        (small_vocab / "tokenizer_config.json").write_text(json.dumps(config))
    ours, theirs = (
        AutoTokenizer.from_pretrained(small_vocab),
        transformers.BertTokenizer.from_pretrained(small_vocab),
    )
    texts = ["Hello hello worlds Café é", "你好 你 好", "hello [MASK] world " * 4]
    options = {"padding": True, "max_length": 6}
    assert dict(ours(texts, **options)) == dict(theirs(texts, truncation=True, **options))


def test_config_overrules_tokenizer_json(minilm_dir, tmp_path):
    shutil.copy(minilm_dir / "tokenizer.json", tmp_path)
    (tmp_path / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "BertTokenizer", "do_lower_case": False})
    )
    ours = AutoTokenizer.from_pretrained(tmp_path)
    expected = transformers.AutoTokenizer.from_pretrained(tmp_path)("Hello hello")
    assert ours("Hello hello")["input_ids"] == expected["input_ids"]
    assert ours.unk_token_id in ours("Hello")["input_ids"]


def test_bpe_tokenizer_json(shared_dir, lines):
    folder = shared_dir / "tokenizers" / "gpt2"
    ours = AutoTokenizer.from_pretrained(folder)
    theirs = transformers.PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"))
    got = ours(lines, truncation=False)
    assert list(got) == ["input_ids", "attention_mask"]
    assert got["input_ids"] == theirs(lines)["input_ids"]


def test_missing_folder(tmp_path):
    with pytest.raises(InputError, match=r"no such tokenizer folder: .*absent"):
        AutoTokenizer.from_pretrained(tmp_path / "absent")


def test_empty_folder_says_what_was_looked_for(tmp_path):
    with pytest.raises(InputError, match=r"looked for tokenizer.json, vocab.txt, tokenizer.model"):
        AutoTokenizer.from_pretrained(tmp_path)


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", '{"version": "1.0", "model": {"type": "Nope"}}'])
def test_corrupt_tokenizer_json(tmp_path, content):
    (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(InputError, match=r"tokenizer.json is not a usable tokenizer.json: "):
        AutoTokenizer.from_pretrained(tmp_path)


def test_tokenizer_json_of_random_bytes(tmp_path):
    (tmp_path / "tokenizer.json").write_bytes(b"\xff\xfe\x00\x80")
    with pytest.raises(InputError, match=r"tokenizer.json is not a usable tokenizer.json"):
        AutoTokenizer.from_pretrained(tmp_path)


def test_corrupt_config(small_vocab):
    (small_vocab / "tokenizer_config.json").write_text("[1]")
    with pytest.raises(InputError, match=r"tokenizer_config.json must hold a JSON object, not a list"):
        AutoTokenizer.from_pretrained(small_vocab)


def test_vocab_without_cls(tmp_path):
    (tmp_path / "vocab.txt").write_text("[PAD]\n[UNK]\nhello\n")
    with pytest.raises(InputError, match=r"vocab.txt has no cls token '\[CLS\]' among its 3 lines"):
        AutoTokenizer.from_pretrained(tmp_path)


def test_vocab_not_utf8(tmp_path):
    (tmp_path / "vocab.txt").write_bytes("[PAD]\n你好\n".encode("gb18030"))
    with pytest.raises(InputError, match=r"vocab.txt is not a usable vocab.txt: "):
        AutoTokenizer.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"truncation": "longest"}, "truncation='longest' is unknown.*did you mean 'longest_first'"),
        ({"padding": "longst"}, "padding='longst' is unknown.*did you mean 'longest'"),
        ({"max_length": 2}, "max_length=2 leaves no room for text: use 3 or more"),
        ({"text_pair": ["a", "b"]}, "1 texts but 2 second texts"),
    ],
)
def test_bad_options(minilm, options, message):
    with pytest.raises(InputError, match=message):
        minilm(["a"], **options)
