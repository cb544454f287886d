"""Conversations of every shape: what is read, how it is written, and which tokens are learnt."""

from __future__ import annotations

import json
import shutil

import pytest
import transformers

from mindpeft.data.batching import IGNORE_INDEX, BucketBatcher
from mindpeft.data.chat_template import render, render_with_spans
from mindpeft.data.conversations import Conversation, read_conversations
from mindpeft.data.instructions import InstructionFormat, choose_template, encode_conversations, encode_texts
from mindpeft.data.named_templates import TEMPLATES
from mindpeft.data.packing import pack
from mindpeft.data.readers import read_table
from mindpeft.data.tokenization import AutoTokenizer
from mindpeft.errors import InputError

TALK = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "One?"},
    {"role": "assistant", "content": "1, of course."},
    {"role": "user", "content": "二呢？"},
    {"role": "assistant", "content": "二 😀"},
]


@pytest.fixture(scope="module")
def qwen(shared_dir):
    return AutoTokenizer.from_pretrained(shared_dir / "tokenizers" / "qwen2_5")


@pytest.fixture
def letters(tmp_path):
    """A tokenizer whose tokens are the bytes of a text, with an end."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE({letter: i for i, letter in enumerate(alphabet)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(["<s>", "</s>"])
    backend.save(str(tmp_path / "tokenizer.json"))
    config = {"bos_token": "<s>", "eos_token": "</s>"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    return AutoTokenizer.from_pretrained(tmp_path)


def learnt(tokenizer, row) -> list[str]:
    """The texts of the runs of learnt tokens."""
    runs, run = [], []
    for label in [*row["labels"], IGNORE_INDEX]:
        if label == IGNORE_INDEX and run:
            runs.append(tokenizer.decode(run))
            run = []
        elif label != IGNORE_INDEX:
            run.append(label)
    return runs


# --- shapes

SHAPES = {
    "messages": {"messages": TALK},
    "sharegpt": {
        "system": "Be brief.",
        "conversations": [
            {"from": {"user": "human", "assistant": "gpt"}[turn["role"]], "value": turn["content"]}
            for turn in TALK[1:]
        ],
    },
    "alpaca": {
        "system": "Be brief.",
        "history": [["One?", "1, of course."]],
        "instruction": "二呢？",
        "input": "",
        "output": "二 😀",
    },
}


@pytest.mark.parametrize("shape", SHAPES)
def test_shapes(tmp_path, shape):
    path = tmp_path / "rows.json"
    path.write_text(json.dumps([SHAPES[shape]]))
    (conversation,) = read_conversations(read_table(path))
    assert conversation == Conversation(TALK, 1)


@pytest.mark.parametrize("column", ["completion", "response", "answer"])
def test_prompt_and_completion(tmp_path, column):
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"prompt": "2 + 2 =", column: "4"}) + "\n")
    (conversation,) = read_conversations(read_table(path))
    assert [turn["content"] for turn in conversation.messages] == ["2 + 2 =", "4"]


def test_alpaca_with_input(tmp_path):
    path = tmp_path / "rows.csv"
    path.write_text("instruction,input,output\nAdd,1 and 2,3\n")
    (conversation,) = read_conversations(read_table(path))
    assert conversation.messages[0]["content"] == "Add\n1 and 2"


BAD = {
    "columns": ({"text": "a"}, "holds no instructions: its columns are text; expected are messages"),
    "not a list": ({"messages": "a"}, "line 1: column 'messages' must hold a list of messages, not 'a'"),
    "empty": ({"messages": []}, "must hold a list of messages"),
    "speaker": ({"messages": [{"role": "me", "content": "a"}]}, "a message of 'me'; known are system, user"),
    "words": ({"messages": [{"role": "user", "content": 1}]}, "a message of 'user' holds '1', not text"),
    "no answer": ({"messages": TALK[:2]}, "nothing in it is said by the assistant"),
    "no output": ({"instruction": "a", "output": " "}, "no text in column 'output'"),
    "history": (
        {"instruction": "a", "output": "b", "history": [["a"]]},
        "pairs of a question and its answer",
    ),
    "system": ({"instruction": "a", "output": "b", "system": 3}, "column 'system' must hold text, not '3'"),
}


@pytest.mark.parametrize(("row", "message"), BAD.values(), ids=BAD)
def test_malformed_rows(tmp_path, row, message):
    path = tmp_path / "rows.json"
    path.write_text(json.dumps([row]))
    with pytest.raises(InputError, match=message):
        read_conversations(read_table(path))


# --- templates and what is learnt

LEARNT = {
    "chatml": ["1, of course.<|im_end|>", "二 😀<|im_end|></s>"],
    "llama2": [" 1, of course. </s>", " 二 😀 </s>"],
    "llama3": ["1, of course.<|eot_id|>", "二 😀<|eot_id|></s>"],
    "mistral": [" 1, of course.</s>", " 二 😀</s>"],
    "gemma": ["1, of course.<end_of_turn>", "二 😀<end_of_turn></s>"],
    "phi3": ["1, of course.<|end|>", "二 😀<|end|></s>"],
    "chatglm3": ["\n 1, of course.", "\n 二 😀</s>"],
    "zephyr": ["1, of course.</s>", "二 😀</s>"],
    "vicuna": [" 1, of course.</s>", " 二 😀</s>"],
    "alpaca": ["1, of course.</s>", "二 😀</s>"],
    "plain": ["1, of course.</s>", "二 😀</s>"],
}


@pytest.mark.parametrize("name", TEMPLATES)
def test_every_turn_of_the_assistant_is_learnt_and_nothing_else(letters, name):
    (row,) = encode_conversations([Conversation(TALK)], letters, InstructionFormat(TEMPLATES[name]))
    assert [text.rstrip("\n") for text in learnt(letters, row)] == LEARNT[name]
    assert row["labels"][0] == IGNORE_INDEX
    whole = letters.apply_chat_template(TALK, chat_template=name)
    text = letters.decode(whole).rstrip()
    ended = text if text.endswith("</s>") else text + "</s>"  # the template's own ends are no tokens here
    assert letters.decode(row["input_ids"]).rstrip() == ended
    prompt = letters.apply_chat_template(TALK[:4], chat_template=name, add_generation_prompt=True)
    assert whole[: len(prompt)] == prompt


def test_learning_the_prompt_too(letters):
    form = InstructionFormat(TEMPLATES["chatml"], train_on_prompt=True)
    (row,) = encode_conversations([Conversation(TALK)], letters, form)
    text = render(TEMPLATES["chatml"], TALK)
    assert learnt(letters, row) == [text[1:].rstrip() + "</s>"]


def test_real_instructions_by_the_checkpoints_own_template(shared_dir, qwen):
    """All tokens are transformers'; the learnt ones are the answer and its end, in 2,000 real rows."""
    theirs = transformers.AutoTokenizer.from_pretrained(shared_dir / "tokenizers" / "qwen2_5")
    for name in ("alpaca_en_demo", "alpaca_zh_demo"):
        table = read_table(shared_dir / "data" / "instructions" / f"{name}.json")
        conversations = read_conversations(table)
        rows = encode_conversations(conversations, qwen, InstructionFormat(choose_template(qwen, None)))
        assert len(rows) == len(conversations) >= 999
        for row, conversation in zip(rows[::20], conversations[::20], strict=True):
            expected = theirs.apply_chat_template(conversation.messages, return_dict=True)["input_ids"]
            assert row["input_ids"] == expected
        for row, conversation in zip(rows, conversations, strict=True):
            assert learnt(qwen, row) == [conversation.messages[-1]["content"] + "<|im_end|>"]


def test_cutting(letters):
    form = InstructionFormat(TEMPLATES["plain"])
    rows = encode_conversations([Conversation(TALK)] * 2, letters, form, max_length=30)
    assert rows.truncated == 2
    assert len(rows[0]["input_ids"]) == 30
    with pytest.raises(InputError, match="cut before the assistant speaks"):
        encode_conversations([Conversation(TALK)], letters, form, max_length=5)


def test_a_template_that_rewrites_what_was_said(letters):
    forgetful = "{% for m in messages[-1:] %}{{ m.content }}{% endfor %}"
    with pytest.raises(InputError, match="line 7: message 3 of 5: the chat template writes it otherwise"):
        encode_conversations([Conversation(TALK, 7)], letters, InstructionFormat(forgetful))


def test_templates_of_checkpoints(tmp_path, letters):
    with pytest.raises(InputError, match=r"no chat template: choose one with data\.template"):
        choose_template(letters, None)
    with pytest.raises(InputError, match=r"unknown template 'chatm'.*did you mean 'chatml'"):
        choose_template(letters, "chatm")
    letters.save_pretrained(tmp_path / "other")
    (tmp_path / "other" / "chat_template.jinja").write_text("{{ messages[0].content }}", encoding="utf-8")
    with_one = AutoTokenizer.from_pretrained(tmp_path / "other")
    assert choose_template(with_one, None) == "{{ messages[0].content }}"
    with_one.save_pretrained(tmp_path / "again")
    assert AutoTokenizer.from_pretrained(tmp_path / "again").chat_template == with_one.chat_template
    shutil.rmtree(tmp_path / "other")


HOSTILE = {
    "objects": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "globals": "{{ render.__globals__ }}",
    "change": "{{ messages.append(1) }}",
    "refusal": "{{ raise_exception('roles must alternate') }}",
    "syntax": "{% for %}",
    "unknown": "{{ messages[0].nothing.at_all }}",
}


@pytest.mark.parametrize("template", HOSTILE.values(), ids=HOSTILE)
def test_hostile_and_broken_templates(template):
    with pytest.raises(InputError, match="the chat template can't write this conversation"):
        render(template, TALK)


def test_generation_tags_and_functions():
    template = (
        "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}"
        "{% if loop.index > 1 %}{% break %}{% endif %}{% endfor %}{{ {'a': '中'} | tojson }}"
    )
    assert render(template, TALK) == 'Be brief.One?{"a": "中"}'
    assert render("{{ strftime_now('%Y') }}", TALK).startswith("20")


def test_spans_are_characters():
    text, spans = render_with_spans(TEMPLATES["chatml"], TALK)
    assert [text[start:end] for start, end in spans] == ["1, of course.<|im_end|>", "二 😀<|im_end|>"]


# --- plain text and packing


def test_plain_texts_in_blocks(letters):
    rows = encode_texts(["abcd", "efg"], letters, 4)
    texts = ["".join(letters.decode(row["input_ids"]) for row in rows)]
    assert texts == ["abcd</s>efg"]  # the last end is alone in its block: nothing to learn
    assert [len(row["input_ids"]) for row in rows] == [4, 4]
    assert all(row["labels"][1:] == row["input_ids"][1:] for row in rows)
    assert all(row["labels"][0] == IGNORE_INDEX for row in rows)


def test_packing_keeps_every_token_once(letters):
    form = InstructionFormat(TEMPLATES["plain"])
    talks = [
        Conversation([{"role": "user", "content": "q" * n}, {"role": "assistant", "content": "a" * n}])
        for n in (1, 9, 3, 3, 7, 2, 5)
    ]
    rows = encode_conversations(talks, letters, form)
    packed = pack(rows, 30)
    assert len(packed) < len(rows)
    pieces = []
    for row in packed:
        assert len(row["input_ids"]) <= 30
        numbers = row["attention_mask"]
        assert sorted(set(numbers)) == list(range(1, max(numbers) + 1))
        for number in range(1, max(numbers) + 1):
            places = [i for i, n in enumerate(numbers) if n == number]
            assert places == list(range(places[0], places[-1] + 1))
            assert [row["position_ids"][i] for i in places] == list(range(len(places)))
            pieces.append(tuple((row["input_ids"][i], row["labels"][i]) for i in places))
    expected = [tuple(zip(row["input_ids"], row["labels"], strict=True)) for row in rows]
    assert sorted(pieces) == sorted(expected)
    batch = next(iter(BucketBatcher(packed, 2)))
    assert batch["position_ids"].shape == batch["input_ids"].shape


def test_packing_real_rows_leaves_little_padding(shared_dir, qwen):
    table = read_table(shared_dir / "data" / "instructions" / "alpaca_zh_demo.json")
    form = InstructionFormat(choose_template(qwen, None))
    rows = encode_conversations(read_conversations(table), qwen, form, 1024)
    packed = pack(rows, 1024)
    apart, together = BucketBatcher(rows, 8), BucketBatcher(packed, 8)
    assert together.padding_share < 0.05 < apart.padding_share
