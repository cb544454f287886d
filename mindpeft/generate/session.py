"""A model set up to write: caches of fixed size, and two graphs, for prompts and for single tokens."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import mindspore as ms
import numpy as np
from mindspore import Tensor, nn, ops

from mindpeft.compiling import CompiledCell
from mindpeft.errors import InputError
from mindpeft.nn.cache import LayerCache
from mindpeft.nn.decoder import DecoderAttention
from mindpeft.ops.attention import Attention
from mindpeft.precision import computing_dtype

_LEAST_BUCKET = 16
_WASTE = 4  # a prompt may be padded to that many times its length before new graphs are compiled


def bucket(length: int) -> int:
    """The length that a text is padded to: the next power of two up to 128, then the next multiple of 128."""
    size = _LEAST_BUCKET
    while size < length and size < 128:
        size *= 2
    return size if length <= size else -(-length // 128) * 128


class _Step(CompiledCell):
    """The model with caches around it; what it returns is the last token's."""

    def __init__(self, model: nn.Cell, caches: nn.CellList):
        super().__init__(auto_prefix=False)
        self.model = model
        self.caches = caches
        self.argmax = ops.Argmax(-1)

    def chosen(self, logits):
        """Logits (rows, 1, vocabulary) without their middle axis, and the best; runs inside a graph."""
        logits = logits.reshape((logits.shape[0], logits.shape[2]))  # a slice would copy, number by number
        return logits, self.argmax(logits)


class PromptStep(_Step):
    """Reads whole prompts, which fill the caches from their beginning."""

    def construct(self, input_ids, attention_mask, position_ids):
        return self.chosen(self.model(input_ids, attention_mask, position_ids, logits_to_keep=1))


class TokenStep(_Step):
    """Reads one token for each row."""

    def construct(self, input_ids, attention_mask, position_ids, place):
        return self.chosen(self.model(input_ids, attention_mask, position_ids, place=place, logits_to_keep=1))


class Reorder(nn.Cell):
    """Lets every row of the caches go on with another row's text, for beams."""

    def __init__(self, caches: nn.CellList):
        super().__init__(auto_prefix=False)
        self.caches = caches

    def construct(self, index):
        for cache in self.caches:
            cache.reorder(index)
        return index


class Session:
    """The caches and graphs for one number of rows and one room.

    Args:
        model: a decoder for the next token, with adapters or without.
        rows: of the batch.
        prompt: the length that prompts are padded to, on the left.
        room: for how many tokens the caches are, the prompts' and virtual ones included.
    """

    def __init__(self, model: nn.Cell, rows: int, prompt: int, room: int) -> None:
        self.model, self.rows, self.prompt, self.room = model, rows, prompt, room
        self.virtual = virtual_tokens(model)
        self.attentions = attentions_of(model)
        self.dtype = computing_dtype(model)
        self.caches = nn.CellList(auto_prefix=False)
        for number, attention in enumerate(self.attentions):
            shape = (rows, attention.key_heads, room, attention.head_size)
            self.caches.append(LayerCache(*shape, self.dtype, f"cache.{number}"))
        self.prompt_step = PromptStep(model, self.caches).set_train(False)
        self.token_step = TokenStep(model, self.caches).set_train(False)
        self.reorder_step = Reorder(self.caches).set_train(False)
        self.written = 0  # tokens in the caches behind the prompts

    @contextmanager
    def attached(self) -> Iterator[None]:
        """The attentions keep what they see in this session's caches."""
        for attention, cache in zip(self.attentions, self.caches, strict=True):
            attention.attend_over(cache)
            cache.kernel = self.kernel_of(attention)
        try:
            yield
        finally:
            for attention in self.attentions:
                attention.attend_over(None)

    def kernel_of(self, attention: DecoderAttention) -> nn.Cell | None:
        """What attends in the cache by itself; None where an adapter stands around the attention."""
        plain = isinstance(attention.attention, Attention) and self.dtype == ms.float32
        return attention.attention.cached_kernel if plain else None

    def read_prompts(self, tokens: np.ndarray, real: np.ndarray) -> tuple[Tensor, Tensor]:
        """Fill the caches with prompts.

        Args:
            tokens: (rows, length), padded on the left, of at most ``prompt`` tokens.
            real: (rows, length), whether a token is no padding.

        Returns:
            Logits (rows, vocabulary) of the next token, and the likeliest, (rows,).
        """
        missing = self.prompt - tokens.shape[1]
        tokens = np.pad(tokens, ((0, 0), (missing, 0))).astype(np.int32)
        real = np.pad(real, ((0, 0), (missing, 0))).astype(np.int32)
        self.counts = real.sum(1)
        positions = np.maximum(np.cumsum(real, 1) - 1, 0).astype(np.int32)
        behind = np.ones((self.rows, self.room - self.virtual - self.prompt), np.int32)
        self.mask = Tensor(np.concatenate((real, behind), 1))
        self.written = 0
        with self.attached():
            return self.prompt_step(Tensor(tokens), Tensor(real), Tensor(positions))

    def read_tokens(self, tokens: np.ndarray) -> tuple[Tensor, Tensor]:
        """Add one token to each row, (rows,); returns the same as `read_prompts`."""
        positions = (self.counts + self.written).astype(np.int32).reshape((-1, 1))
        place = np.array([self.prompt + self.written], np.int32)
        self.written += 1
        with self.attached():
            ids = Tensor(tokens.astype(np.int32).reshape((-1, 1)))
            return self.token_step(ids, self.mask, Tensor(positions), Tensor(place))

    def reorder(self, index: np.ndarray) -> None:
        """Let row i go on with the text of row ``index[i]``; the prompts of both must be the same."""
        self.reorder_step(Tensor(index.astype(np.int32)))


def attentions_of(model: nn.Cell) -> list[DecoderAttention]:
    """The attention of every layer.

    Raises:
        InputError: the model has none that can keep a cache.
    """
    found = [cell for _, cell in model.cells_and_names() if isinstance(cell, DecoderAttention)]
    if not found:
        kind = type(model).__name__
        raise InputError(f"{kind} can't generate: it is no decoder (AutoModelForCausalLM opens decoders)")
    return found


def virtual_tokens(model: nn.Cell) -> int:
    """How many tokens adapters put in front of a text."""
    return sum(getattr(cell, "virtual_tokens", 0) for _, cell in model.cells_and_names())


class Sessions:
    """The session that a model keeps for the next call, so that it compiles nothing again.

    Attributes:
        least: prompts are padded to at least this length; a chat grows from call to call.
    """

    def __init__(self, model: nn.Cell) -> None:
        self.model = model
        self.least = _LEAST_BUCKET
        self.kept: Session | None = None

    def get(self, rows: int, prompt: int, new: int) -> Session:
        """A session with room for prompts of a length and this many new tokens."""
        padded, virtual = bucket(max(prompt, self.least)), virtual_tokens(self.model)
        kept = self.kept
        fits = (
            kept is not None
            and kept.rows == rows
            and kept.virtual == virtual
            and padded <= kept.prompt <= _WASTE * padded
            and kept.prompt + new + virtual <= kept.room
        )
        if not fits:
            self.kept = None  # its memory first
            self.kept = Session(self.model, rows, padded, bucket(padded + new) + virtual)
        return self.kept
