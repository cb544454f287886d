"""What the methods share that turn a cell's input: OFT and BOFT by blocks, HRA by reflections."""

from __future__ import annotations

import math
from typing import Any, ClassVar

import mindspore as ms
import numpy as np
from mindspore import nn, ops

from mindpeft.errors import InputError
from mindpeft.ops.attention import MergeHeads, SplitHeads
from mindpeft.tuners.base import Shapes, Site, Tensors, TunerLayer, original

_MOST_GROUPS = 32  # of columns that are turned apart from each other


class TurnedInput(TunerLayer):
    """y = W (x R) + b with an orthogonal matrix R, which acts on the input and is never made in the graph."""

    @classmethod
    def rotation(cls, site: Site, tensors: Tensors) -> np.ndarray:
        """R (in, in), in float32: what a row is multiplied by from the right."""
        raise NotImplementedError

    @classmethod
    def merged(cls, site: Site, weights: Tensors, tensors: Tensors, shared: Tensors | None = None) -> Tensors:
        return {"weight": weights["weight"] @ cls.rotation(site, tensors).T}

    def turned(self, x: ms.Tensor) -> ms.Tensor:
        """x R for x in the slot's dtype, with R = I while the slot is switched off; runs inside a graph."""
        raise NotImplementedError

    def turned_input(self, x: ms.Tensor) -> ms.Tensor:
        """The same in x's dtype."""
        return ops.cast(self.turned(ops.cast(x, self.slot_dtype)), x.dtype)

    def construct(self, x: ms.Tensor) -> ms.Tensor:
        return self.base_layer(self.turned_input(x))


class TurnedKernel(TurnedInput):
    """A convolution whose weight is turned, each output's inputs and kernel in one row.

    Layers of such methods inside are turned further. What layers of other methods inside add is not: those
    act beside it, whatever their order.
    """

    def __init__(self, base_layer: nn.Cell, *slot: Any) -> None:
        super().__init__(base_layer, *slot)
        cell = original(base_layer)
        self.shape = cell.weight.shape
        inner = base_layer
        while isinstance(inner, TunerLayer) and not isinstance(inner, TurnedKernel):
            inner = inner.base_layer
        self.innermost = inner is cell
        object.__setattr__(self, "inner", inner)  # no child: it is one already, further inside
        self.convolution = ops.Conv2D(
            cell.out_channels, cell.kernel_size, pad_mode=cell.pad_mode, pad=cell.padding, stride=cell.stride
        )

    @classmethod
    def merged(cls, site: Site, weights: Tensors, tensors: Tensors, shared: Tensors | None = None) -> Tensors:
        weight = weights["weight"]
        rows = {"weight": weight.reshape(len(weight), -1)}
        return {"weight": super().merged(site, rows, tensors, shared)["weight"].reshape(weight.shape)}

    def turned_rows(self, rows: ms.Tensor) -> ms.Tensor:
        """The weight (out, in * height * width) turned; runs inside a graph."""
        raise NotImplementedError

    def inner_rows(self) -> ms.Tensor:
        """The weight as this layer finds it; runs inside a graph."""
        if self.innermost:
            return ops.cast(self.inner.weight, self.slot_dtype).reshape((self.shape[0], -1))
        return self.inner.rows()

    def rows(self) -> ms.Tensor:
        """The weight as this layer leaves it; runs inside a graph."""
        rows = self.inner_rows()
        return self.unless_off(self.turned_rows(rows), rows)

    def construct(self, x: ms.Tensor) -> ms.Tensor:
        result = self.base_layer(x)
        change = (self.rows() - self.inner_rows()).reshape(self.shape)
        update = self.convolution(ops.cast(x, self.slot_dtype), change)
        return ops.cast(ops.cast(result, self.slot_dtype) + update, result.dtype)


def check_convolution(cell: nn.Conv2d, path: str, method: str) -> None:
    """Raise ``InputError`` for a convolution that PEFT's method takes for another one."""
    padding = cell.padding if isinstance(cell.padding, tuple) else (cell.padding,)
    uneven = any(len(set(sides)) > 1 for sides in (cell.kernel_size, cell.stride, padding))
    if cell.group > 1 or uneven or set(cell.dilation) != {1}:
        raise InputError(
            f"{method} can't wrap {path!r}: convolutions must have a square kernel, one stride and padding, "
            "no groups and no dilation"
        )


class BlockRotation(nn.Cell):
    """x (..., blocks * size) with each block of columns multiplied by its matrix of (blocks, size, size).

    Neighbouring blocks are put into larger matrices, with zeros between them, until few are left: each of
    those costs a copy of its columns.
    """

    def __init__(self, blocks: int, size: int, dtype: ms.dtype) -> None:
        super().__init__()
        self.size = size
        groups = max(n for n in range(1, _MOST_GROUPS + 1) if blocks % n == 0)
        self.groups, self.together = groups, blocks // groups
        mask = np.kron(np.eye(self.together), np.ones((size, size)))
        self.mask = ms.Tensor(np.tile(mask, (groups, 1, 1)) if self.together > 1 else np.ones(1), dtype)
        self.split, self.merge = SplitHeads(groups), MergeHeads(groups)
        self.product, self.tile = ops.BatchMatMul(), ops.Tile()

    def construct(self, x: ms.Tensor, matrices: ms.Tensor) -> ms.Tensor:
        width = self.together * self.size
        if self.together > 1:
            rows = matrices.reshape((self.groups, width, self.size))
            matrices = self.tile(rows, (1, 1, self.together)) * self.mask
        columns = self.split(x.reshape((1, -1, x.shape[-1])))
        return self.merge(self.product(columns, matrices.reshape((1, self.groups, width, width)))).reshape(
            x.shape
        )


class DroppedBlocks(nn.Cell):
    """(blocks, size, size) with the share ``p`` of the blocks, rounded down, made identities in training."""

    def __init__(self, p: float) -> None:
        super().__init__()
        self.p = p
        self.normal, self.largest, self.tile = ops.StandardNormal(), ops.TopK(), ops.Tile()

    def construct(self, matrices: ms.Tensor) -> ms.Tensor:
        blocks, size, _ = matrices.shape
        count = int(self.p * blocks)
        if not self.training or count == 0:
            return matrices
        drawn = self.normal((blocks,))
        dropped = (drawn >= self.largest(drawn, count)[0][count - 1]).astype(matrices.dtype)
        dropped = self.tile(dropped.reshape((blocks, 1, 1)), (1, size, size))
        return matrices + dropped * (identities(matrices) - matrices)


class TurnedBlocks(TurnedInput):
    """R is made of blocks along its diagonal, each from a skew-symmetric matrix."""

    RATE: ClassVar[str]  # the config's key of the share of blocks that are dropped

    def __init__(self, base_layer: nn.Cell, *slot: Any) -> None:
        super().__init__(base_layer, *slot)
        self.dropped = DroppedBlocks(0.0)

    def configure(self, config: Any, trainable: bool) -> bool:
        rate = getattr(config, self.RATE)
        changed = trainable and self.dropped.p != rate
        if changed:
            self.dropped = DroppedBlocks(rate).set_train(self.training)
        return changed

    @classmethod
    def holds(cls, room: Shapes, shapes: Shapes) -> bool:
        return room == shapes  # a matrix of a padded skew-symmetric one is another matrix

    def blocks(self) -> ms.Tensor:
        """The matrices (blocks, size, size), or (1, size, size) if all are the same; runs inside a graph."""
        raise NotImplementedError

    def turned(self, x: ms.Tensor) -> ms.Tensor:
        matrices = self.blocks()
        matrices = self.unless_off(matrices, identities(matrices))
        if matrices.shape[0] == 1:
            rows = x.reshape((-1, matrices.shape[-1]))
            return self.linear(rows, ops.transpose(matrices[0], (1, 0))).reshape(x.shape)
        return self.rotate(x, self.dropped(matrices))


def identities(like: ms.Tensor) -> ms.Tensor:
    """As many identity matrices as ``like`` (blocks, size, size) has blocks; runs inside a graph."""
    return ops.tile(ops.eye(like.shape[-1], like.shape[-1], like.dtype), (like.shape[0], 1, 1))


def cayley(skew: ms.Tensor) -> ms.Tensor:
    """(I - S) (I + S)^-1 of skew-symmetric matrices (blocks, size, size): rotations; runs inside a graph."""
    one = identities(skew)
    return ops.inverse(one + skew) * 2.0 - one  # (I - S) M = (2 I - (I + S)) M = 2 M - I for M = (I + S)^-1


def cayley_of(skew: np.ndarray) -> np.ndarray:
    """``cayley`` on the host, in float64."""
    one = np.eye(skew.shape[-1])
    return 2 * np.linalg.inv(one + skew.astype(np.float64)) - one


def block_diagonal(matrices: np.ndarray, width: int) -> np.ndarray:
    """The matrix (width, width) with these blocks, a single one repeated, along its diagonal, in float32."""
    size = matrices.shape[-1]
    result = np.zeros((width, width), np.float32)
    for number in range(width // size):
        part = slice(number * size, (number + 1) * size)
        result[part, part] = matrices[number % len(matrices)]
    return result


def skew_layout(count: int) -> tuple[int, np.ndarray, np.ndarray]:
    """How ``count`` numbers of a strict upper triangle, row by row, lie in a skew-symmetric matrix.

    Returns:
        the matrix's size; for each of its places which number goes there, and its sign (0 on the diagonal).
    """
    size = (1 + math.isqrt(1 + 8 * count)) // 2
    index, sign = np.zeros((size, size), np.int32), np.zeros((size, size), np.float32)
    upper = np.triu_indices(size, 1)
    index[upper], sign[upper] = np.arange(count), 1
    return size, index + index.T, sign - sign.T
