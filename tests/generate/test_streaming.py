"""Text as it comes, and where it stops."""

from __future__ import annotations

import io

import numpy as np
import pytest

from mindpeft.generate.config import GenerationConfig
from mindpeft.generate.stopping import Stopping
from mindpeft.generate.streaming import TextStreamer


class Bytes:
    """A tokenizer whose tokens are bytes; 0 is special."""

    def decode(self, ids, skip_special_tokens=False):
        kept = [i for i in ids if i or not skip_special_tokens]
        return bytes(kept).decode("utf-8", "replace")


def test_characters_come_whole():
    shown, text = io.StringIO(), "né 中文!"
    streamer = TextStreamer(Bytes(), shown)
    seen = []
    for byte in [*text.encode(), 0]:
        streamer.put(byte)
        seen.append(shown.getvalue())
    streamer.end()
    assert all(text.startswith(part) for part in seen)
    assert shown.getvalue() == text
    streamer.put(65)
    streamer.end()
    assert shown.getvalue() == f"{text}A"


def test_what_leads_to_the_words_is_not_shown():
    for text, expected in {"\n word": "word", "word": "word", "\n": "\n", "\nword": "\nword"}.items():
        shown = io.StringIO()
        streamer = TextStreamer(Bytes(), shown, lead="\n ")
        for byte in text.encode():
            streamer.put(byte)
        streamer.end()
        assert shown.getvalue() == expected


def test_what_can_not_become_a_character_comes_at_the_end():
    shown = io.StringIO()
    streamer = TextStreamer(Bytes(), shown)
    streamer.put(0xE4)
    assert shown.getvalue() == ""
    streamer.end()
    assert shown.getvalue() == "\ufffd"


def test_ends():
    stopping = Stopping(GenerationConfig(eos_token_id=[7, 9]))
    np.testing.assert_array_equal(stopping(np.array([[1, 7], [7, 1], [0, 9]])), [True, False, True])


@pytest.mark.parametrize(
    ("text", "stops"),
    [("one STOP", True), ("one STO", False), ("one STOP two", False), ("STOP, STOP", True), ("中。", True)],
)
def test_stop_strings_count_when_they_are_complete(text, stops):
    stopping = Stopping(GenerationConfig(stop_strings=["STOP", "。"]), Bytes())
    row = np.array([list(text.encode())])
    assert stopping(row)[0] == stops
