"""Checks of shapes that run while a graph is compiled, so that a user's mistake gets a user's message."""

from __future__ import annotations

from mindspore import ops

from mindpeft.errors import InputError


@ops.constexpr
def check_length(length: int, most: int) -> int:
    """Return the length of a text if there are positions for it.

    Raises:
        InputError: it has more tokens than the model has positions.
    """
    if length > most:
        raise InputError(
            f"the text has {length} tokens, but max_position_embeddings is {most}; truncate it (max_length)"
        )
    return length
