"""Trainable tokens: a few rows of an embedding are trained, the others stay as they are.

The tensor holds whole rows that replace the table's, in spite of its name in the format. Where an output
layer is tied to the table, its rows for those tokens are the same trained ones.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

import mindspore as ms
import numpy as np
from mindspore import nn, ops

from mindpeft.config import PeftConfig, PeftType, register_method
from mindpeft.errors import InputError, did_you_mean
from mindpeft.ops.linear import linear
from mindpeft.parameters import assign
from mindpeft.targets import saved_modules
from mindpeft.tuners.base import (
    Shapes,
    SharedSlot,
    Site,
    Slot,
    Tensors,
    TunerLayer,
    is_embedding,
    is_linear,
    is_transposed,
    original,
    refuse_cell,
    weight_attribute,
)
from mindpeft.tuners.targeted import name_set

if TYPE_CHECKING:
    from mindpeft.tuners.plan import BaseModel


@register_method
@dataclass
class TrainableTokensConfig(PeftConfig):
    """Hugging Face PEFT's configuration of trainable tokens, key by key.

    Attributes:
        token_indices: the ids of the tokens to train.
        target_modules: embeddings (or output layers): names or dotted suffixes, or a regular expression for
            the full path; ``None`` takes the model's input embedding.
        init_weights: start with the table's own rows; else with normal numbers.

    Raises:
        InputError: a value is not allowed; for a model, an id outside the vocabulary.
    """

    token_indices: list[int] = field(default_factory=list)
    target_modules: set[str] | list[str] | str | None = None
    init_weights: bool = True

    METHOD: ClassVar[PeftType] = PeftType.TRAINABLE_TOKENS
    EXAMPLE: ClassVar[Mapping[str, Any]] = {"token_indices": list(range(10))}

    def __post_init__(self) -> None:
        super().__post_init__()
        self.target_modules = name_set(self.target_modules, "target_modules")
        check_tokens("token_indices", self.token_indices)

    def resolve(self, base: BaseModel) -> None:
        if self.target_modules is None:
            self.target_modules = input_embedding(base)

    def slot_classes(self, base: BaseModel) -> dict[str, type[Slot]]:
        return token_classes(base, dict.fromkeys(base.targets(self), self.token_indices), TokenRows)

    def tokens_of(self, path: str) -> list[int]:
        """The ids that are trained in the cell at a path."""
        return self.token_indices

    @property
    def fresh_tokens(self) -> bool:
        """Whether the rows start with numbers of their own."""
        return not self.init_weights


def check_tokens(key: str, tokens: Any) -> None:
    """Raise ``InputError`` unless ``tokens`` lists token ids, each once."""
    if (
        not isinstance(tokens, list | tuple)
        or not tokens
        or not all(type(i) is int and i >= 0 for i in tokens)
    ):
        raise InputError(f"{key} must list the ids of the tokens to train, such as [5, 17], not {tokens!r}")
    if len(set(tokens)) < len(tokens):
        twice = next(token for token in tokens if tokens.count(token) > 1)
        raise InputError(f"{key} has the token {twice} more than once")


def input_embedding(base: BaseModel) -> str:
    """The path of a model's input embedding; "embed_tokens" if the model doesn't tell it."""
    getter = getattr(base.model, "get_input_embeddings", None)
    cell = original(getter()) if getter else None
    return next((path for path, other in base.cells.items() if other is cell), "embed_tokens")


def token_classes(
    base: BaseModel, tokens: Mapping[str, list[int]], rows: type[TokenRows]
) -> dict[str, type[Slot]]:
    """The slots' classes for the cells in ``tokens`` (path -> ids) and for the layers tied to them.

    Raises:
        InputError: a cell is neither an embedding nor a linear cell, or an id is outside its vocabulary.
    """
    for path, indices in tokens.items():
        table = _table(base.cells[path])
        if table is None:
            raise refuse_cell(base.cells[path], path, "trainable tokens", "embeddings and output layers")
        if max(indices) >= table.shape[0]:
            raise InputError(f"the token {max(indices)} is outside the {table.shape[0]} rows of {path!r}")
    sources: dict[int, str] = {}
    for path, indices in tokens.items():
        first = sources.setdefault(id(_table(base.cells[path])), path)
        if list(indices) != list(tokens[first]):
            raise InputError(f"{first!r} and {path!r} are tied: they need the same tokens")
    owners = {path: rows.of(base.cells[path]) for path in sources.values()}
    tied = {
        path: rows.TIED
        for path, cell in base.cells.items()
        if is_linear(cell) and path not in owners and id(_table(cell)) in sources
    }
    return {"": TokenLayers, **owners, **tied} if tied else owners


def _table(cell: nn.Cell) -> ms.Parameter | None:
    """The matrix with a row for each token."""
    fits = is_embedding(cell) or (is_linear(cell) and not is_transposed(cell))
    return getattr(cell, weight_attribute(cell)) if fits else None


class TrainsTokens:
    """What a config with PEFT's key ``trainable_token_indices`` needs to train tokens besides."""

    fresh_tokens = False

    def check_token_indices(self) -> None:
        """Raise ``InputError`` for anything but ids, or ids by the names of embeddings."""
        given = self.trainable_token_indices
        if isinstance(given, dict) and given:
            for name, tokens in given.items():
                check_tokens(f"trainable_token_indices[{name!r}]", tokens)
        elif given is not None:
            check_tokens("trainable_token_indices", given)

    def tokens_of(self, path: str) -> list[int]:
        """The ids that are trained in the cell at a path; none given for it, an empty list."""
        given = self.trainable_token_indices
        if not isinstance(given, dict):
            return given
        return next((tokens for name, tokens in given.items() if path.endswith(name)), [])

    def token_slots(self, base: BaseModel, wrapped: Collection[str]) -> dict[str, type[Slot]]:
        """The slots' classes for the tokens.

        Raises:
            InputError: an embedding isn't there, or the adapter wraps or saves it already.
        """
        given = self.trainable_token_indices
        if given is None:
            return {}
        names = list(given) if isinstance(given, dict) else [input_embedding(base)]
        absent = [name for name in names if not any(path.endswith(name) for path in base.cells)]
        if absent:
            raise InputError(
                f"trainable_token_indices names {absent[0]!r}, which no cell's name ends with"
                f"{did_you_mean(absent[0], base.cells)}"
            )
        paths = [path for path in base.cells if path.endswith(tuple(names))]
        tokens = {path: self.tokens_of(path) for path in paths}
        classes = token_classes(base, tokens, TokenAdapter)
        twice = [path for path in classes if path in wrapped or path in saved_modules(self, base.cells)]
        if twice:
            raise InputError(
                f"{twice[0]!r} is trained by trainable_token_indices; take it out of target_modules and "
                "modules_to_save"
            )
        return classes


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
        table = _table(cell)
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
        return {cls.NAME: (len(site.config.tokens_of(site.path)), _table(site.cell).shape[1])}

    @classmethod
    def initial_tensors(cls, site: Site) -> Tensors:
        rows = _table(site.cell).asnumpy()[site.config.tokens_of(site.path)].astype(np.float32)
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
        scores = linear(ops.reshape(ops.cast(x, self.slot_dtype), (-1, self.dim)), self.rows())
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
