"""When a text has ended."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np

from mindpeft.errors import InputError
from mindpeft.generate.config import GenerationConfig


def cut(text: str, stops: Iterable[str]) -> str:
    """A text without the stop string that ended it and what is behind."""
    found = [text.index(stop) for stop in stops if stop in text]
    return text[: min(found)] if found else text


class Stopping:
    """Tells whether texts end with their last token.

    Args:
        config: its ends and stop strings.
        tokenizer: turns tokens to text; needed for stop strings.

    Raises:
        InputError: stop strings without a tokenizer.
    """

    def __init__(self, config: GenerationConfig, tokenizer: Any = None) -> None:
        self.ends = np.array(config.ends, np.int64)
        self.texts = config.stopping_texts
        self.tokenizer = tokenizer
        if self.texts and tokenizer is None:
            raise InputError("stop_strings needs the tokenizer: generate(..., tokenizer=tokenizer)")
        # A token can be less than a character: that many tokens hold the longest stop string for sure.
        self.window = 4 * max(map(len, self.texts), default=0) + 8

    def __call__(self, written: np.ndarray) -> np.ndarray:
        """(rows,), of texts (rows, tokens)."""
        found = np.isin(written[:, -1], self.ends)
        if self.texts:
            found |= np.array([self.holds_stop(row) for row in written])
        return found

    def holds_stop(self, row: np.ndarray) -> bool:
        """Whether the last token completed a stop string."""
        text = self.tokenizer.decode(row[-self.window :].tolist())
        before = self.tokenizer.decode(row[-self.window : -1].tolist())
        return any(text.count(stop) > before.count(stop) for stop in self.texts)
