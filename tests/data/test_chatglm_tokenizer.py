"""ChatGLM's tokenizer against SentencePiece itself, and the documented order of the tokens behind the pieces.

The published file is tried too where the folder of real data holds ``tokenizers/chatglm3/tokenizer.model``.
"""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
import sentencepiece
import transformers

from mindpeft.data.conversations import Conversation
from mindpeft.data.instructions import InstructionFormat, encode_conversations
from mindpeft.data.named_templates import TEMPLATES
from mindpeft.data.tokenization import AutoTokenizer
from mindpeft.errors import InputError
from tests.data.test_instructions import TALK, learnt

ROOT = Path(__file__).parents[2]
BEHIND = ["[MASK]", "[gMASK]", "[sMASK]", "sop", "eop"]
BEHIND += ["<|system|>", "<|user|>", "<|assistant|>", "<|observation|>"]
CONFIG = {
    "tokenizer_class": "ChatGLMTokenizer",
    "auto_map": {"AutoTokenizer": ["tokenization_chatglm.ChatGLMTokenizer", None]},
}
# As later published folders list them: without a word that "sop" stands alone.
LISTED = {"content": "sop", "special": True, "normalized": False, "single_word": False}


def trained(**settings) -> bytes:
    """A small model with the settings of the published one."""
    written = io.BytesIO()
    lines = [line for name in ("README.md", "README_zh.md") for line in (ROOT / name).open(encoding="utf-8")]
    chosen = {
        "model_type": "bpe",
        "vocab_size": 1500,
        "byte_fallback": True,
        "normalization_rule_name": "identity",
        "remove_extra_whitespaces": False,
        "split_digits": True,
        "allow_whitespace_only_pieces": True,
        "minloglevel": 2,
    }
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines), model_writer=written, **{**chosen, **settings}
    )
    return written.getvalue()


def write_folder(folder: Path, model: bytes, **config) -> Path:
    (folder / "tokenizer.model").write_bytes(model)
    (folder / "tokenizer_config.json").write_text(json.dumps({**CONFIG, **config}))
    return folder


@pytest.fixture(scope="module", params=["trained", "published"])
def model(request) -> bytes:
    if request.param == "trained":
        return trained()
    path = request.getfixturevalue("shared_dir") / "tokenizers" / "chatglm3" / "tokenizer.model"
    if not path.is_file():
        pytest.skip(f"the published tokenizer {path} is absent")
    return path.read_bytes()


@pytest.fixture(scope="module")
def sp(model) -> sentencepiece.SentencePieceProcessor:
    return sentencepiece.SentencePieceProcessor(model_proto=model)


@pytest.fixture(scope="module")
def ours(model, tmp_path_factory):
    return AutoTokenizer.from_pretrained(write_folder(tmp_path_factory.mktemp("chatglm"), model))


@pytest.fixture(scope="module")
def texts(lines) -> list[str]:
    """Without tokens written out, which are read as such here as everywhere in this project."""
    more = [
        "  leading",
        "trailing  ",
        "a\u00a0b",
        "tab\tand",
        "new\nline\n\n",
        " " * 33,
        "aesop's philosophy",
    ]
    written_out = ("<s>", "</s>", "<unk>", *BEHIND)
    return [line for line in lines if not any(token in line for token in written_out)] + more


def test_tokens_and_text_are_sentencepiece_s(ours, sp, texts):
    prefix = [sp.vocab_size() + BEHIND.index(token) for token in ("[gMASK]", "sop")]
    expected = [sp.encode(text) for text in texts]
    assert ours(texts, truncation=False)["input_ids"] == [prefix + ids for ids in expected]
    assert ours(texts, truncation=False, add_special_tokens=False)["input_ids"] == expected
    assert [ours.decode(ids) for ids in expected] == [sp.decode(ids) for ids in expected]
    assert ours("one", "two")["input_ids"] == [*prefix, *sp.encode("one"), *sp.encode("two"), sp.eos_id()]


def test_a_model_without_a_space_before_texts(texts, tmp_path):
    """CodeGeeX2's, under the same name."""
    model = trained(add_dummy_prefix=False)
    sp = sentencepiece.SentencePieceProcessor(model_proto=model)
    ours = AutoTokenizer.from_pretrained(write_folder(tmp_path, model))
    expected = [sp.encode(text) for text in texts]
    assert ours(texts, truncation=False, add_special_tokens=False)["input_ids"] == expected
    assert [ours.decode(ids) for ids in expected] == [sp.decode(ids) for ids in expected]


def test_the_tokens_behind_the_pieces(ours, sp):
    assert ours.convert_tokens_to_ids(BEHIND) == [sp.vocab_size() + i for i in range(len(BEHIND))]
    assert len(ours) == sp.vocab_size() + len(BEHIND)
    assert (ours.pad_token_id, ours.unk_token_id, ours.eos_token_id) == (0, 0, sp.eos_id())
    assert (ours.bos_token_id, ours.padding_side) == (None, "left")
    assert ours.model_input_names == ["input_ids", "attention_mask"]


def test_conversations(ours, sp):
    """Every turn is its speaker, what SentencePiece makes of a line's end, and what it makes of the words."""
    talk = [*TALK, {"role": "tool", "content": '{"two": 2}'}, {"role": "user", "content": " 好 "}]
    number = {token: sp.vocab_size() + i for i, token in enumerate(BEHIND)}
    expected = [number["[gMASK]"], number["sop"]]
    for turn in talk:
        role = "observation" if turn["role"] == "tool" else turn["role"]
        expected += [number[f"<|{role}|>"], *sp.encode("\n"), *sp.encode(turn["content"])]
    expected += [number["<|assistant|>"]]
    ids = ours.apply_chat_template(talk, chat_template="chatglm3", add_generation_prompt=True)
    assert ids == expected
    text = ours.apply_chat_template(talk, chat_template="chatglm3", tokenize=False)
    assert text.startswith("[gMASK]sop<|system|>\n Be brief.<|user|>\n One?<|assistant|>\n 1, of course.")
    assert ours.decode(ids[:-1]) == text


def test_the_published_numbers(ours, sp):
    """Those that issues and ports of ChatGLM3 quote for its shortest conversation."""
    if sp.vocab_size() != 64789:
        pytest.skip("this is not the published model")
    hello = [{"role": "user", "content": "你好"}]
    ids = ours.apply_chat_template(hello, chat_template="chatglm3", add_generation_prompt=True)
    assert ids == [64790, 64792, 64795, 30910, 13, 36474, 54591, 64796]


def test_what_is_learnt(ours, sp):
    (row,) = encode_conversations([Conversation(TALK)], ours, InstructionFormat(TEMPLATES["chatglm3"]))
    assert learnt(ours, row) == ["\n 1, of course.", "\n 二 😀</s>"]
    answer = [*sp.encode("\n"), *sp.encode("二 😀"), sp.eos_id()]
    assert row["labels"][-len(answer) :] == answer


def test_words_that_are_tokens_count_alone(ours, sp):
    sop = sp.vocab_size() + BEHIND.index("sop")
    for text, count in {"philosophy": 0, "Aesop": 0, "[gMASK]sop<|user|>": 1, "中sop": 0}.items():
        assert ours(text, add_special_tokens=False)["input_ids"].count(sop) == count


def test_written_and_read_again(ours, texts, tmp_path):
    ours.save_pretrained(tmp_path)
    again, theirs = (
        AutoTokenizer.from_pretrained(tmp_path),
        transformers.AutoTokenizer.from_pretrained(tmp_path),
    )
    expected = ours(texts, truncation=False)
    assert dict(again(texts, truncation=False)) == dict(theirs(texts)) == dict(expected)
    assert theirs.padding_side == again.padding_side == "left"
    assert theirs.special_tokens_map.items() >= ours.special_tokens_map.items()
    ids = ours.apply_chat_template(TALK, chat_template="chatglm3")
    assert again.decode(ids) == theirs.decode(ids) == ours.decode(ids)


def test_listed_tokens(tmp_path, model, ours, sp):
    listed = {
        str(sp.vocab_size() + BEHIND.index("sop")): LISTED,
        str(sp.vocab_size() + len(BEHIND)): {"content": "<|more|>", "special": True},
    }
    folder = write_folder(tmp_path, model, added_tokens_decoder=listed, chat_template="{{ 1 }}")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer("philosophy")["input_ids"] == ours("philosophy")["input_ids"]
    assert tokenizer.convert_tokens_to_ids("<|more|>") == len(ours)
    assert tokenizer.chat_template == "{{ 1 }}"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"model_type": "unigram", "vocab_size": 1200},
            "of unigrams; ChatGLM's are of byte pairs",
        ),
        ({"user_defined_symbols": ["sop"]}, "has 'sop' among its pieces"),
    ],
    ids=["unigrams", "pieces"],
)
def test_models_that_are_not_chatglm_s(tmp_path, settings, message):
    with pytest.raises(InputError, match=message):
        AutoTokenizer.from_pretrained(write_folder(tmp_path, trained(**settings)))
