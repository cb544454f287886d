"""The layers of trainable tokens: around embeddings, output layers, and output layers tied to embeddings."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import mindspore as ms
import numpy as np
from mindspore import nn, ops

from mindpeft.nn.int8 import Int8Linear
from mindpeft.parameters import assign
from mindpeft.tuners.base import (
    Shapes,
    SharedSlot,
    Site,
    Tensors,
    TunerLayer,
    is_embedding,
    is_linear,
    is_transposed,
    original,
    weight_attribute,
)


def token_table(cell: nn.Cell) -> ms.Parameter | None:
    """The matrix with a row for each token."""
    is_table = is_linear(cell) and not is_transposed(cell) and not isinstance(cell, Int8Linear)
    fits = is_embedding(cell) or is_table
    return getattr(cell, weight_attribute(cell)) if fits else None


class TokenLayers(SharedSlot):
    """Knows the layers of an adapter's embeddings, so that tied layers find them; has no tensors."""

    def __init__(self, *slot: Any) -> None:
        super().__init__(*slot)
        self.layers: dict[int, TokenRows] = {}

    @classmethod
    def tensor_shapes(cls, site: Site) -> Shapes:
        return {}

    @classmethod
    def initial_tensors(cls, site: Site) -> Tensors:
        return {}


class TokenRows(TunerLayer):
    """An embedding some of whose rows are replaced: trainable_tokens_delta (tokens, dim)."""

    FOLLOWS_TIES = True
    NAME: ClassVar[str] = "trainable_tokens_delta"
    COLUMNS: ClassVar[type[TokenRows]]
    TIED: ClassVar[type[TokenRows]]

    def __init__(self, base_layer: nn.Cell, *slot: Any) -> None:
        super().__init__(base_layer, *slot)
        cell = self.cell = original(base_layer)
        table = token_table(cell)
        self.dim = table.shape[1]
        # For each token the row that replaces its own, or -1.
        nowhere = ms.Tensor(np.full(table.shape[0], -1, np.int32))
        self.row_of = ms.Parameter(nowhere, name=self._name("row_of"), requires_grad=False)
        padding = getattr(cell, "padding_idx", None)
        self.padding = -1 if padding is None else padding
        self.embed_scale = float(getattr(cell, "embed_scale", 1.0))  # Gemma's
        self.biased = getattr(cell, "bias", None) is not None
        self.tile = ops.Tile()
        if self.shared is not None:
            self.meet(table)

    def meet(self, table: ms.Parameter) -> None:
        """Make the layer known to those tied to it."""
        self.shared.layers[id(table)] = self

    @classmethod
    def of(cls, cell: nn.Cell) -> type[TokenRows]:
        """The class for an embedding, or for a linear cell."""
        return cls if is_embedding(cell) else cls.COLUMNS

    @classmethod
    def tensor_shapes(cls, site: Site) -> Shapes:
        return {cls.NAME: (len(site.config.tokens_of(site.path)), token_table(site.cell).shape[1])}

    @classmethod
    def initial_tensors(cls, site: Site) -> Tensors:
        rows = token_table(site.cell).asnumpy()[site.config.tokens_of(site.path)].astype(np.float32)
        if site.config.fresh_tokens:
            rows = np.random.standard_normal(rows.shape).astype(np.float32)
        return {cls.NAME: rows}

    @classmethod
    def merged(cls, site: Site, weights: Tensors, tensors: Tensors, shared: Tensors | None = None) -> Tensors:
        attribute = weight_attribute(site.cell)
        table = weights[attribute].copy()
        table[site.config.tokens_of(site.path)] = tensors[cls.NAME]
        return {attribute: table}

    def configure(self, config: Any, trainable: bool) -> bool:
        indices = config.tokens_of(self.path)
        row_of = np.full(self.row_of.shape, -1, np.int32)
        row_of[indices] = np.arange(len(indices))
        assign(self.row_of, row_of)
        return False

    def rows(self) -> ms.Tensor:
        """The trained rows, (at least tokens, dim)."""
        return self.trainable_tokens_delta

    def construct(self, ids: ms.Tensor) -> ms.Tensor:
        result = self.base_layer(ids)
        rows = self.rows()
        if self.padding >= 0:
            # As in torch, the padding token's row gets no gradient here.
            held = ops.equal(ops.arange(rows.shape[0]).astype(ms.int32), self.row_of[self.padding])
            held = self.tile(ops.reshape(held, (-1, 1)), (1, self.dim))
            rows = ops.select(held, ops.stop_gradient(rows), rows)
        at = ops.gather(self.row_of, ops.reshape(ids, (-1,)), 0)
        new = ops.gather(rows, ops.maximum(at, 0), 0)
        if self.embed_scale != 1.0:
            new = new * self.embed_scale
        return self.chosen(ops.reshape(at, (-1, 1)), (1, self.dim), new, result)

    def chosen(self, at: ms.Tensor, repeats: tuple[int, int], new: ms.Tensor, plain: ms.Tensor) -> ms.Tensor:
        """``new`` where ``at`` (tiled) names a row and the slot is on, else ``plain``."""
        replaced = ops.logical_and(ops.greater_equal(at, 0), ops.not_equal(self.scaling, 0.0))
        new = ops.reshape(ops.cast(new, plain.dtype), plain.shape)
        return ops.select(ops.reshape(self.tile(replaced, repeats), plain.shape), new, plain)


class TokenColumns(TokenRows):
    """An output layer some of whose rows are replaced, so that those tokens get other scores."""

    def construct(self, x: ms.Tensor) -> ms.Tensor:
        result = self.base_layer(x)
        scores = self.linear(ops.reshape(ops.cast(x, self.slot_dtype), (-1, self.dim)), self.rows())
        new = ops.gather(scores, ops.maximum(self.row_of, 0), 1)
        if self.biased:
            new = ops.bias_add(new, ops.cast(self.cell.bias, self.slot_dtype))
        return self.chosen(ops.reshape(self.row_of, (1, -1)), (new.shape[0], 1), new, result)


class TiedTokens(TokenColumns):
    """An output layer tied to an embedding: it uses that one's rows, and repeats them in the file."""

    BUFFERS = frozenset({TokenRows.NAME})  # not parameters of its own

    def meet(self, table: ms.Parameter) -> None:
        self.source = self.shared.layers[id(table)]
        self.row_of = self.source.row_of

    def configure(self, config: Any, trainable: bool) -> bool:
        return False  # the embedding's layer has done it

    @classmethod
    def merged(cls, site: Site, weights: Tensors, tensors: Tensors, shared: Tensors | None = None) -> Tensors:
        return {}  # merging the embedding has changed this layer's weight as well

    def reserve(self, shapes: Shapes) -> bool:
        self.slot_shapes = dict(shapes)
        return False

    def fill(self, tensors: Mapping[str, np.ndarray], trained: frozenset[str]) -> None:
        """Nothing: the embedding's layer is filled."""

    def read(self, shapes: Shapes) -> Tensors:
        return {
            name: self.source.read({self.source.NAME: shape})[self.source.NAME]
            for name, shape in shapes.items()
        }

    def rows(self) -> ms.Tensor:
        return self.source.rows()


class TokenAdapter(TokenRows):
    """Trained rows of an embedding in another method's adapter, where tied layers repeat nothing."""

    NAME = "token_adapter.trainable_tokens_delta"

    def rows(self) -> ms.Tensor:
        return self.token_adapter.trainable_tokens_delta


class TokenAdapterColumns(TokenColumns):
    """The same of an output layer."""

    NAME = TokenAdapter.NAME

    def rows(self) -> ms.Tensor:
        return self.token_adapter.trainable_tokens_delta


class TiedTokenAdapter(TiedTokens):
    """An output layer tied to such an embedding."""

    @classmethod
    def tensor_shapes(cls, site: Site) -> Shapes:
        return {}

    @classmethod
    def initial_tensors(cls, site: Site) -> Tensors:
        return {}


TokenRows.COLUMNS, TokenRows.TIED = TokenColumns, TiedTokens
TokenAdapter.COLUMNS, TokenAdapter.TIED = TokenAdapterColumns, TiedTokenAdapter
