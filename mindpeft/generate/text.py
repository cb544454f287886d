"""``generate``: prompts to texts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields
from typing import Any, Protocol

import numpy as np
from mindspore import Tensor, nn

from mindpeft.errors import InputError
from mindpeft.generate.beams import BeamSearch, search
from mindpeft.generate.choose import Chooser
from mindpeft.generate.config import GenerationConfig
from mindpeft.generate.session import Session, Sessions
from mindpeft.generate.stopping import Stopping

_SESSIONS = "_generation_sessions"  # the attribute under which a model keeps them


class Streamer(Protocol):
    """What is told of every token."""

    def put(self, token: int) -> None: ...

    def end(self) -> None: ...


def generate(
    model: nn.Cell,
    input_ids: Tensor | np.ndarray | Sequence[Sequence[int]],
    attention_mask: Tensor | np.ndarray | None = None,
    *,
    generation_config: GenerationConfig | None = None,
    tokenizer: Any = None,
    streamer: Streamer | None = None,
    **overrides: Any,
) -> Tensor:
    """Write on behind prompts, as Hugging Face's ``generate`` does.

    A first call compiles two graphs, for prompts and for single tokens; calls with the same number of rows
    and lengths in the same bucket use them again, with any other settings or adapter.

    Args:
        model: a decoder for the next token, with adapters or without.
        input_ids: (batch, length) tokens, or lists of unequal length; shorter ones are padded on the left.
        attention_mask: (batch, length), 0 for padding, which must be on the left.
        generation_config: how; by default the model's (its folder's ``generation_config.json``).
        tokenizer: for ``stop_strings``.
        streamer: told of each token of a single text.
        overrides: keys of `GenerationConfig`, which win over it.

    Returns:
        (batch * num_return_sequences, length + new tokens) tokens, the prompts in front; what ended early is
        filled up with ``pad_token_id``.

    Raises:
        InputError: an argument is not allowed, or the model is no decoder or has no room for the text.
    """
    config = (generation_config or default_config(model)).overridden(overrides)
    tokens, real = prompts_of(input_ids, attention_mask, config)
    most = config.new_tokens(tokens.shape[1])
    check_room(model, tokens.shape[1] + most)
    copies = config.rows_per_prompt
    repeated, repeated_real = np.repeat(tokens, copies, 0), np.repeat(real, copies, 0)
    if streamer is not None and (len(repeated) > 1 or config.num_beams > 1):
        raise InputError("a streamer shows one text: one prompt, num_beams=1 and num_return_sequences=1")
    stopping, chooser = Stopping(config, tokenizer), Chooser(config, repeated, repeated_real)
    session = sessions_of(model).get(len(repeated), tokens.shape[1], most)
    training = model.training
    model.set_train(False)
    try:
        if config.num_beams > 1:
            state = BeamSearch(config, len(tokens), most, filler_of(config), stopping)
            written = search(session, state, chooser, repeated, repeated_real)
        else:
            written = write(session, chooser, stopping, config, repeated, repeated_real, most, streamer)
    finally:
        model.set_train(training)
    prompts = np.repeat(tokens, config.num_return_sequences, 0)
    return Tensor(np.concatenate((prompts, written), 1).astype(np.int32))


def rows_per_prompt(
    model: nn.Cell, generation_config: GenerationConfig | None = None, **arguments: Any
) -> int:
    """How many rows `generate` runs for each prompt, given the same arguments."""
    keys = {entry.name for entry in fields(GenerationConfig)}
    overrides = {key: value for key, value in arguments.items() if key in keys}
    return (generation_config or default_config(model)).overridden(overrides).rows_per_prompt


def write(
    session: Session,
    chooser: Chooser,
    stopping: Stopping,
    config: GenerationConfig,
    tokens: np.ndarray,
    real: np.ndarray,
    most: int,
    streamer: Streamer | None,
) -> np.ndarray:
    """Token after token, the likeliest or drawn; (rows, tokens written)."""
    filler = filler_of(config)
    written = np.full((len(tokens), most), filler, np.int64)
    ended = np.zeros(len(tokens), bool)
    logits, likeliest = session.read_prompts(tokens, real)
    for count in range(most):
        if chooser.is_plain:
            chosen = likeliest.asnumpy()
        else:
            chosen = chooser.next_tokens(logits.asnumpy(), written[:, :count])
        chosen = np.where(ended, filler, chosen)
        written[:, count] = chosen
        if streamer is not None:
            streamer.put(int(chosen[0]))
        ended |= stopping(written[:, : count + 1])
        if ended.all() or count + 1 == most:
            break
        logits, likeliest = session.read_tokens(chosen)
    if streamer is not None:
        streamer.end()
    return written[:, : count + 1]


def filler_of(config: GenerationConfig) -> int:
    """The token behind the end of a text."""
    if config.pad_token_id is not None:
        return config.pad_token_id
    return config.ends[0] if config.ends else 0


def prompts_of(
    input_ids: Any, attention_mask: Any, config: GenerationConfig
) -> tuple[np.ndarray, np.ndarray]:
    """Prompts as (batch, length) tokens padded on the left, and whether each is no padding."""
    if isinstance(input_ids, Tensor | np.ndarray):
        tokens = np.asarray(input_ids.asnumpy() if isinstance(input_ids, Tensor) else input_ids)
        if tokens.ndim != 2 or 0 in tokens.shape or tokens.dtype.kind not in "iu":
            raise InputError(f"input_ids must be (batch, length) integers, not {tokens.dtype} {tokens.shape}")
        if attention_mask is None:
            return tokens, np.ones(tokens.shape, bool)
        mask = attention_mask.asnumpy() if isinstance(attention_mask, Tensor) else np.asarray(attention_mask)
        return tokens, checked_mask(mask, tokens.shape)
    rows = [list(row) or _beginning(config) for row in input_ids]
    longest = max(map(len, rows), default=0)
    if not longest:
        raise InputError("input_ids holds no prompt")
    tokens = np.full((len(rows), longest), filler_of(config), np.int64)
    real = np.zeros(tokens.shape, bool)
    for row, place in zip(rows, range(len(rows)), strict=True):
        tokens[place, longest - len(row) :] = row
        real[place, longest - len(row) :] = True
    return tokens, real


def _beginning(config: GenerationConfig) -> list[int]:
    if config.bos_token_id is None:
        raise InputError("an empty prompt needs a bos_token_id to begin with")
    return [config.bos_token_id]


def checked_mask(mask: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """The mask as booleans.

    Raises:
        InputError: another shape, or padding that is not on the left.
    """
    real = mask != 0
    if real.shape != shape:
        raise InputError(f"attention_mask is {mask.shape}, but input_ids is {shape}")
    if not real[:, -1].all() or (np.diff(real.astype(int), axis=1) < 0).any():
        raise InputError("prompts must be padded on the left: attention_mask has zeros behind ones")
    return real


def default_config(model: nn.Cell) -> GenerationConfig:
    """What the model's folder says, or else its config: the tokens that end, pad and begin a text."""
    config = model.config
    found = GenerationConfig.from_folder(config.name_or_path) if config.name_or_path else GenerationConfig()
    keys = ("eos_token_id", "pad_token_id", "bos_token_id")
    missing = {key: getattr(config, key, None) for key in keys if getattr(found, key) is None}
    return found.overridden(missing)


def check_room(model: nn.Cell, length: int) -> None:
    """Raise ``InputError`` if a model's learned positions don't reach so far."""
    most = getattr(model.config, "max_position_embeddings", None)
    if most is not None and length > most and not getattr(model.config, "rope_theta", None):
        raise InputError(
            f"prompt and new tokens are {length}, but max_position_embeddings is {most}; lower max_new_tokens"
        )


def sessions_of(model: nn.Cell) -> Sessions:
    """The sessions that a model keeps."""
    kept = model.__dict__.get(_SESSIONS)
    if kept is None:
        kept = Sessions(model)
        object.__setattr__(model, _SESSIONS, kept)
    return kept
