"""Showing text while it is written."""

from __future__ import annotations

import sys
from typing import Any, TextIO

_UNFINISHED = "\ufffd"  # what a decoder puts for a part of a character


class TextStreamer:
    """Prints each token's text as soon as its characters are whole.

    Args:
        tokenizer: turns tokens to text.
        stream: where to; the terminal's output by default.
        lead: not shown where the text begins with it.
    """

    def __init__(self, tokenizer: Any, stream: TextIO | None = None, lead: str = "") -> None:
        self.tokenizer = tokenizer
        self.stream = stream or sys.stdout
        self.lead = lead
        self.tokens: list[int] = []
        self.shown = 0  # characters

    def put(self, token: int) -> None:
        """Take the next token."""
        self.tokens.append(token)
        text = self.tokenizer.decode(self.tokens, skip_special_tokens=True)
        if not text.endswith(_UNFINISHED) and not self.lead.startswith(text):
            self.show(text)

    def end(self) -> None:
        """Show the rest."""
        self.show(self.tokenizer.decode(self.tokens, skip_special_tokens=True))
        self.tokens, self.shown = [], 0

    def show(self, text: str) -> None:
        """Print what is new."""
        text = text.removeprefix(self.lead)
        print(text[self.shown :], end="", file=self.stream, flush=True)
        self.shown = len(text)
