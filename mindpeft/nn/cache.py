"""Keys and values of the tokens before, in memory of fixed size."""

from __future__ import annotations

import mindspore as ms
import mindspore.nn as nn
import numpy as np
from mindspore import Parameter, Tensor, ops

from mindpeft.nn.parameter import empty_parameter


class LayerCache(nn.Cell):
    """One layer's keys and values, (rows, heads, room, size), written in place.

    Args:
        rows: of the batch.
        heads: of keys and values.
        room: for how many tokens.
        size: columns of a head.
        dtype: of keys and values.
        name: of its parameters, before ``.keys`` and ``.values``.

    Attributes:
        kernel: attention that writes to the cache itself, if it can be used; the cache is not called then.
    """

    def __init__(
        self, rows: int, heads: int, room: int, size: int, dtype: ms.Type = ms.float32, name: str = "cache"
    ):
        super().__init__(auto_prefix=False)
        self.shape = (rows, heads, room, size)
        self.keys = self.memory(dtype, f"{name}.keys")
        self.values = self.memory(dtype, f"{name}.values")
        self.lines = Tensor(np.arange(rows * heads).reshape((-1, 1)) * room, ms.int32)
        self.write = ops.ScatterUpdate()
        self.kernel: nn.Cell | None = None

    def memory(self, dtype: ms.Type, name: str) -> Parameter:
        """Zeros that no optimizer trains, one line for each row, head and token."""
        rows, heads, room, size = self.shape
        parameter = empty_parameter((rows * heads * room, size), dtype)
        parameter.requires_grad = False
        parameter.name = name
        return parameter

    def construct(self, key: Tensor, value: Tensor, place: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Write new tokens and return what they see.

        Args:
            key, value: (rows, heads, tokens, size).
            place: (1,), of the first token; None for the beginning, before which there is nothing to see.

        Returns:
            Keys and values, (rows, heads, room, size), or the tokens' own at the beginning.
        """
        tokens, size = key.shape[2:]
        steps = ops.arange(tokens).astype(ms.int32)
        steps = steps if place is None else steps + place
        lines = (self.lines + steps.reshape((1, tokens))).reshape((-1,))
        keys = self.write(self.keys, lines, key.reshape((-1, size)))
        values = self.write(self.values, lines, value.reshape((-1, size)))
        if place is None:
            key, value = ops.depend(key, keys), ops.depend(value, values)
            return key, value
        return keys.reshape(self.shape), values.reshape(self.shape)

    def reorder(self, index: Tensor) -> None:
        """Give every row another row's tokens; runs inside a graph."""
        for memory in (self.keys, self.values):
            rows = memory.reshape((self.shape[0], -1))
            ops.assign(memory, ops.gather(rows, index, 0).reshape(memory.shape))
