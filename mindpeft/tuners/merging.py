"""Merging: what the base model's parameters become with some adapters in them."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator

import numpy as np
from mindspore import nn

from mindpeft.errors import InputError
from mindpeft.parameters import Place
from mindpeft.tuners.adapter import Adapter, Part
from mindpeft.tuners.base import Tensors, TunerLayer
from mindpeft.tuners.int8 import check_merge_int8
from mindpeft.tuners.plan import BaseModel

logger = logging.getLogger(__name__)


class Merging:
    """A merge that is about to be made.

    Args:
        base: the bare model, its parameters as they are with nothing merged.
        paths: the places that have slots.
        parts: of the adapters, in the order in which they act.
    """

    def __init__(self, base: BaseModel, paths: list[str], parts: list[Part]) -> None:
        self.base, self.paths, self.parts = base, paths, parts
        self._shared = base.shared_names()

    def check(self, safe: bool) -> None:
        """Raise ``InputError`` for what can't be merged; with ``safe`` for values that aren't finite, too."""
        for part in self.parts:
            check_merge_int8(part.plan)
            for path, kind in part.plan.classes.items():
                if issubclass(kind, TunerLayer):
                    kind.check_merge(part.plan.sites[path])
        if not safe:
            return
        for place, value in self.values():
            if not np.isfinite(value.astype(np.float32)).all():
                raise InputError(f"merging gives values that are not finite at {place.parameter.name!r}")

    def values(self) -> Iterator[tuple[Place, np.ndarray]]:
        """Each base parameter that changes, with its merged value: worked out in float32, rounded once."""
        for path in self.paths:
            cell = self.base.cells[path] if path else self.base.model
            places = {attribute: Place(cell, attribute) for attribute in _own_attributes(cell)}
            weights = {key: place.parameter.asnumpy() for key, place in places.items()}
            changed: Tensors = {}
            for part in self.parts:
                kind = part.plan.classes.get(path)
                if kind is not None and issubclass(kind, TunerLayer):
                    current = {key: value.astype(np.float32) for key, value in {**weights, **changed}.items()}
                    site, tensors = part.plan.sites[path], part.tensors
                    changed |= kind.merged(site, current, tensors[path], tensors.get(""))
            for attribute, value in changed.items():
                yield places[attribute], value.astype(weights[attribute].dtype)

    def warn_of_ties(self, place: Place) -> None:
        """Say so where a changed parameter has another name whose cell the adapters leave alone."""
        tied = self._shared.get(id(place.parameter), [])
        if not all(self._follows_ties(key.rpartition(".")[0]) for key in tied):
            logger.warning(
                "merging changes %s, one tied parameter: the merged model is not the adapted one",
                " and ".join(tied),
            )

    def _follows_ties(self, path: str) -> bool:
        """Whether one of the adapters changes the cell at a path as it changes those tied to it."""
        kinds = [part.plan.classes.get(path) for part in self.parts]
        return any(kind is not None and kind.FOLLOWS_TIES for kind in kinds)


def taken_out(base: BaseModel, adapters: Iterable[Adapter]) -> Tensors:
    """What adapters took out of the base model's parameters, in float32, by the parameters' names."""
    taken: Tensors = {}
    for part in (part for adapter in adapters for part in adapter.parts):
        for path, initial in part.initial.items():
            site = part.plan.sites[path]
            for attribute, value in part.plan.classes[path].taken_out(site, initial).items():
                key = base.name_of(site.cell, attribute)
                taken[key] = taken[key] + value if key in taken else value
    return taken


def _own_attributes(cell: nn.Cell) -> list[str]:
    """The names of a cell's own parameters, not those of cells inside it."""
    return [name.rsplit(".", 1)[-1] for name, _ in cell.parameters_and_names(expand=False)]
