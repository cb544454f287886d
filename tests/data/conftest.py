"""Fixtures for the tests of data: texts on which tokenizers differ when one of them is wrong."""

from __future__ import annotations

import itertools
import random

import pytest

WORDS = """
wait until a socket is ready for reading café naïve Ångström Straße İstanbul ﬁne ½ x² e\u0301 don't
state-of-the-art C++ __init__ self.x[0]+=1 http://a.b/c?d=e#f user@host 3.14159 1,000,000 $5 €7 # @ ~ ^ | \\
人工智能 模型 训练 我爱北京 天安门 ， 。 「引号」 한국어 日本語 カタカナ Привет мир ελληνικά עברית العربية
हिन्दी
🙂 👩‍👩‍👧 🇨🇳 ❤️ \u200b \ufeff \u00ad \u3000 \u00a0 \t pneumonoultramicroscopicsilicovolcanoconiosis
""".replace("\n", " ")

FIXED = [
    "",
    " ",
    "\n",
    "\t \r\n",
    "\x00\x01\x7f",
    "\ufffd",
    "a",
    "[MASK]",
    "[CLS] hello [SEP] world [PAD] [UNK]",
    "The capital of [MASK] is Paris.[SEP]",
    "[mask] [cls] [MASK][MASK]x[MASK]",
    "##ing ## unaffable ##able",
    "def f(x: int) -> str:\n    return f'{x!r}'  # comment",
    "for (int i = 0; i < n; ++i) { sum += a[i] * b[i]; }",
    '{"key": [1, 2, {"k": null}]}',
    "<s> </s> <unk> <|endoftext|>",
    "今天天气很好，我们去公园玩吧！",
    "这個混合了繁體和简体, and English 单词 with 數字123。",
    "𠀀𠮷𪚥 ext B",
    "a" * 150,
    "word " * 700,
    "很长的文本" * 200,
    "İI ıi ǅ ﬀ ẞ",
    "e\u0301\u0302 a\u030a o\u0308",
    "\u202eright to left\u202c",
    "C:\\path\\to\\file.txt /usr/bin/python3",
    "2024-01-31T12:34:56+08:00",
    "!!!???...,,,;;;:::",
    "“quotes” ‘single’ — dash – en… ellipsis",
    "1st 2nd 3rd 4½",
]


@pytest.fixture(scope="session")
def lines() -> list[str]:
    """300 texts: English, Chinese, emoji, code, empty, special tokens, very long; the same in every run."""
    rng, words = random.Random(0), WORDS.split(" ")
    made = (" ".join(rng.choices(words, k=rng.randint(1, 30))) for _ in itertools.count())
    return list(itertools.islice(itertools.chain(FIXED, made), 300))
