"""How to generate, in the names of Hugging Face's ``GenerationConfig``."""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from mindpeft.errors import InputError, did_you_mean
from mindpeft.files import read_json

GENERATION_CONFIG_NAME = "generation_config.json"

_WHOLE: dict[str, int] = {
    "max_new_tokens": 1,
    "min_new_tokens": 0,
    "max_length": 1,
    "top_k": 0,
    "num_beams": 1,
    "num_return_sequences": 1,
    "seed": 0,
    "pad_token_id": 0,
    "bos_token_id": 0,
}
_REAL: dict[str, tuple[Callable[[float], bool], str]] = {
    "temperature": (lambda value: value > 0, "greater than 0 (do_sample=false takes the likeliest token)"),
    "top_p": (lambda value: 0 < value <= 1, "in (0, 1]"),
    "min_p": (lambda value: 0 <= value <= 1, "in [0, 1]"),
    "repetition_penalty": (lambda value: value > 0, "greater than 0"),
    "presence_penalty": (math.isfinite, "finite"),
    "length_penalty": (math.isfinite, "finite"),
}


@dataclass
class GenerationConfig:
    """How to choose tokens and when to stop.

    Args:
        max_new_tokens: how many to write at most.
        max_length: the same with the prompt counted; ``max_new_tokens`` wins.
        min_new_tokens: no end before this many.
        do_sample: draw tokens; else take the likeliest.
        temperature: divides the logits before drawing.
        top_k: draw from this many likeliest tokens; 0 for all.
        top_p: draw from the likeliest tokens that have this probability together.
        min_p: draw from tokens with at least this share of the likeliest one's probability.
        repetition_penalty: divides the positive logits of tokens in the text so far, prompt included, and
            multiplies their negative ones (Keskar et al., 2019).
        presence_penalty: subtracted from the logits of tokens that were written already.
        num_beams: how many texts are followed at once (beam search); 1 for none.
        length_penalty: beams are compared by log-probability / length ** length_penalty.
        early_stopping: end a beam search as soon as there are ``num_beams`` ended texts; ``"never"`` only
            when no better one is possible.
        num_return_sequences: texts for each prompt.
        eos_token_id: what ends a text: a number or several.
        pad_token_id: what stands behind the end; by default the (first) end.
        bos_token_id: what an empty prompt begins with.
        stop_strings: texts that end a text too; needs the tokenizer.
        seed: of the draws; by default from NumPy's generator (``mindspore.set_seed``).

    Raises:
        InputError: a value is not allowed.
    """

    max_new_tokens: int | None = None
    max_length: int | None = None
    min_new_tokens: int = 0
    do_sample: bool = False
    temperature: float = 1.0
    top_k: int = 50
    top_p: float = 1.0
    min_p: float | None = None
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    num_beams: int = 1
    length_penalty: float = 1.0
    early_stopping: bool | str = False
    num_return_sequences: int = 1
    eos_token_id: int | list[int] | None = None
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    stop_strings: str | list[str] | None = None
    seed: int | None = None

    def __post_init__(self) -> None:
        for key, least in _WHOLE.items():
            value = getattr(self, key)
            if value is not None and (type(value) is not int or value < least):
                raise InputError(f"{key} must be an integer, {least} or more, not {value!r}")
        for key, (fits, what) in _REAL.items():
            value = getattr(self, key)
            number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
            if value is not None and not (number and fits(value)):
                raise InputError(f"{key} must be a number {what}, not {value!r}")
        if self.early_stopping not in (True, False, "never"):
            raise InputError(f'early_stopping must be true, false or "never", not {self.early_stopping!r}')
        texts = self.stopping_texts
        if not all(isinstance(text, str) and text for text in texts):
            raise InputError(f"stop_strings must be texts that are not empty, not {self.stop_strings!r}")
        if not all(type(number) is int and number >= 0 for number in self.ends):
            raise InputError(f"eos_token_id must be one or several token numbers, not {self.eos_token_id!r}")
        if not self.do_sample and self.num_return_sequences > self.num_beams:
            raise InputError(
                f"num_return_sequences {self.num_return_sequences} needs do_sample=true or as many num_beams"
            )

    @property
    def ends(self) -> tuple[int, ...]:
        """The tokens that end a text."""
        if self.eos_token_id is None:
            return ()
        return tuple(self.eos_token_id) if isinstance(self.eos_token_id, list) else (self.eos_token_id,)

    @property
    def stopping_texts(self) -> tuple[str, ...]:
        """The texts that end a text."""
        if self.stop_strings is None:
            return ()
        return (self.stop_strings,) if isinstance(self.stop_strings, str) else tuple(self.stop_strings)

    @property
    def rows_per_prompt(self) -> int:
        """Beams, or texts drawn side by side."""
        return self.num_beams if self.num_beams > 1 else self.num_return_sequences

    def new_tokens(self, prompt: int) -> int:
        """How many tokens to write at most behind a prompt of this length; 20 if nothing says.

        Raises:
            InputError: the prompt alone is ``max_length`` long.
        """
        if self.max_new_tokens is not None or self.max_length is None:
            return self.max_new_tokens or 20
        if prompt >= self.max_length:
            raise InputError(
                f"the prompt has {prompt} tokens, so max_length {self.max_length} leaves no more"
            )
        return self.max_length - prompt

    def overridden(self, overrides: dict[str, Any]) -> GenerationConfig:
        """The same with some keys changed.

        Raises:
            InputError: an unknown key, or a value that is not allowed.
        """
        known = [entry.name for entry in fields(self)]
        for key in overrides:
            if key not in known:
                raise InputError(f"generate has no argument {key!r}{did_you_mean(key, known)}")
        return replace(self, **overrides)

    @classmethod
    def from_folder(cls, folder: str | os.PathLike) -> GenerationConfig:
        """What a checkpoint folder's ``generation_config.json`` says; its other keys are left out.

        Raises:
            InputError: the file is damaged.
        """
        path = Path(folder) / GENERATION_CONFIG_NAME
        if not path.is_file():
            return cls()
        values = read_json(path)
        if not isinstance(values, dict):
            raise InputError(f"{path} holds a {type(values).__name__}, not an object of keys")
        known = {entry.name for entry in fields(cls)}
        try:
            return cls(**{key: value for key, value in values.items() if key in known and value is not None})
        except InputError as error:
            raise InputError(f"{path}: {error}") from error
