"""What the methods share that train parameters of the base model where they are, without layers."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar

from mindpeft.errors import InputError
from mindpeft.targets import Match, find_targets, match_name, saved_modules
from mindpeft.tuners.base import Slot
from mindpeft.tuners.targeted import TargetedConfig

if TYPE_CHECKING:
    from mindpeft.tuners.plan import BaseModel


@dataclass
class SelectionConfig(TargetedConfig):
    """A config that selects parameters of the base model.

    The adapter keeps values of its own for them, and the base model's own values wait beside it on the host:
    two copies of what is selected. Half-precision parameters are trained in their own dtype. Values are
    saved absolute, by the parameters' Hugging Face names.

    Attributes:
        target_modules: cells (with all inside them) or single parameters: names or dotted suffixes, or a
            regular expression for the full path; ``None`` for no restriction, ``[]`` for nothing besides
            ``modules_to_save`` (the head alone).
        exclude_modules: what is left frozen, given the same way.
        modules_to_save: cells trained and saved whole besides.
    """

    exclude_modules: set[str] | list[str] | str | None = None

    # What the method trains, for messages.
    SUBJECT: ClassVar[str] = "parameters"

    def resolve(self, base: BaseModel) -> None:
        """Nothing to fill in: without targets nothing is ruled out."""

    def slot_classes(self, base: BaseModel) -> dict[str, type[Slot]]:
        return {}

    def suits(self, name: str) -> bool:
        """Whether the method trains a parameter of that name, if the config names it."""
        return True

    def selected(self, base: BaseModel, wrapped: Collection[str]) -> list[str]:
        if isinstance(self.target_modules, set) and self.target_modules <= set(self.modules_to_save or ()):
            return []  # the saved cells alone: the head
        config = self if self.target_modules is not None else replace(self, target_modules=".*")
        named = set(find_targets(config, [*base.cells, *base.places]))
        saved = tuple(f"{path}." for path in saved_modules(self, base.cells))
        ties: dict[int, list[str]] = {}  # a tied parameter occurs under each of its names
        for name, place in base.places.items():
            if not name.startswith(saved):
                ties.setdefault(id(place.parameter), []).append(name)
        chosen = [
            names[0]
            for names in ties.values()
            if any(part in named for name in names for part in _prefixes(name))
            and all(self.suits(name) and not _excludes(config, name) for name in names)
        ]
        if base.count(chosen) == 0:
            raise InputError(
                f"{self.peft_type.value} finds nothing to train: the model has no {self.SUBJECT} that "
                f"target_modules={self.target_modules!r} and exclude_modules={self.exclude_modules!r} leave"
            )
        return chosen


def _excludes(config: SelectionConfig, name: str) -> bool:
    return any(match_name(config, part) is Match.EXCLUDED for part in _prefixes(name))


def _prefixes(name: str) -> Iterator[str]:
    """A parameter's name, and the names of the cells that it is in."""
    while name:
        yield name
        name = name.rpartition(".")[0]
