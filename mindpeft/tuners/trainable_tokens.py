"""Trainable tokens: a few rows of an embedding are trained, the others stay as they are.

The tensor holds whole rows that replace the table's, in spite of its name in the format. Where an output
layer is tied to the table, its rows for those tokens are the same trained ones.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

from mindpeft.config import PeftConfig, PeftType, register_method
from mindpeft.errors import InputError, did_you_mean
from mindpeft.targets import saved_modules
from mindpeft.tuners.base import Slot, is_linear, original, refuse_cell
from mindpeft.tuners.targeted import name_set
from mindpeft.tuners.trainable_tokens_layers import TokenAdapter, TokenLayers, TokenRows, token_table

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
        table = token_table(base.cells[path])
        if table is None:
            raise refuse_cell(base.cells[path], path, "trainable tokens", "embeddings and output layers")
        if max(indices) >= table.shape[0]:
            raise InputError(f"the token {max(indices)} is outside the {table.shape[0]} rows of {path!r}")
    sources: dict[int, str] = {}
    for path, indices in tokens.items():
        first = sources.setdefault(id(token_table(base.cells[path])), path)
        if list(indices) != list(tokens[first]):
            raise InputError(f"{first!r} and {path!r} are tied: they need the same tokens")
    owners = {path: rows.of(base.cells[path]) for path in sources.values()}
    tied = {
        path: rows.TIED
        for path, cell in base.cells.items()
        if is_linear(cell) and path not in owners and id(token_table(cell)) in sources
    }
    return {"": TokenLayers, **owners, **tied} if tied else owners


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
