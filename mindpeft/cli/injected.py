"""What an adapter puts where: from its files alone, or from the model that it was put into."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.table import Table

from mindpeft.adapter_files import base_name, is_stray, part_folders, tensor_shapes
from mindpeft.config import PeftConfig
from mindpeft.status import Named
from mindpeft.targets import Match, match_name
from mindpeft.tuners.selection import SelectionConfig

if TYPE_CHECKING:
    from mindpeft.peft_model import PeftModel

SAVED, SELECTED = "saved", "selected"  # as in the status of a model's layers


@dataclass(frozen=True)
class Injection:
    """The same tensors in places that differ in layer numbers at most.

    Attributes:
        place: the path, () for the model itself; a part such as "[0-11]" stands for several numbers.
        kind: the method or its layer; "saved" for cells saved whole, "selected" for trained base parameters.
        tensors: (name, shape) of those of one place.
        places: how many places there are.
    """

    place: tuple[str, ...]
    kind: str
    tensors: tuple[Named, ...]
    places: int = 1

    def row(self) -> dict[str, Any]:
        """The injection in JSON's types, all its numbers counted."""
        size = self.places * sum(math.prod(shape) for _, shape in self.tensors)
        return {
            "place": ".".join(self.place),
            "places": self.places,
            "kind": self.kind,
            "tensors": {name: list(shape) for name, shape in self.tensors},
            "parameters": size,
        }


def from_files(folder: Path) -> list[Injection]:
    """What the files of an adapter's folder hold; a place is a prefix of a name that its config targets."""
    found = []
    for part in part_folders(folder):
        config = PeftConfig.from_pretrained(part)
        places: dict[tuple[str, str], list[Named]] = {}
        for name, shape in tensor_shapes(part, config).items():
            if not is_stray(name):
                place, kind, leaf = _placed(config, name)
                places.setdefault((place, kind), []).append((leaf, shape))
        injections = [Injection(_parts(path), kind, tuple(held)) for (path, kind), held in places.items()]
        found += _folded(sorted(injections, key=lambda injection: list(map(_natural, injection.place))))
    return found


def _placed(config: PeftConfig, name: str) -> tuple[str, str, str]:
    """A tensor's place, its kind, and its name there."""
    method, (cell, _, leaf) = config.peft_type.value, base_name(name).rpartition(".")
    paths = list(_paths(name))
    saved = tuple(getattr(config, "modules_to_save", None) or ())
    if any(path == module or path.endswith(f".{module}") for path in paths for module in saved):
        return cell, SAVED, leaf
    if isinstance(config, SelectionConfig) or base_name(name) != name:
        return cell, SELECTED, leaf
    if not cell or getattr(config, "target_modules", None) is None:
        return cell, method, leaf
    for path in paths:
        if match_name(config, path) is Match.TARGET:
            return path, method, name[len(path) + 1 :]
    return cell, SELECTED, leaf


def _paths(name: str) -> Iterator[str]:
    """The cells that a tensor may be in, the innermost first."""
    while name := name.rpartition(".")[0]:
        yield name


def from_model(model: PeftModel) -> list[Injection]:
    """What a model's adapters have in it, one adapter after the other, in the model's order."""
    layers, found = model.get_layer_status(), []
    for name in model.peft_config:
        found += _folded(
            Injection(_parts(layer.name), layer.module_type, tuple(layer.tensors[name]))
            for layer in layers
            if name in layer.tensors
        )
    return found


def _parts(path: str) -> tuple[str, ...]:
    return tuple(path.split(".")) if path else ()


def _natural(part: str) -> tuple[int, str]:
    return (int(part), "") if part.isdecimal() else (-1, part)


def _folded(injections: Iterable[Injection]) -> list[Injection]:
    """The injections with those alike but for one number in their place made one, number by number."""
    found = list(injections)
    for depth in range(max((len(injection.place) for injection in found), default=0)):
        alike: dict[Any, list[Injection]] = {}
        for injection in found:
            place = injection.place
            numbered = len(place) > depth and place[depth].isdecimal()
            rest = (*place[:depth], None, *place[depth + 1 :]) if numbered else place
            alike.setdefault((rest, injection.kind, injection.tensors), []).append(injection)
        found = [_joined(group, depth) for group in alike.values()]
    return found


def _joined(group: list[Injection], depth: int) -> Injection:
    first = group[0]
    if len(group) == 1:
        return first
    numbers = sorted({int(member.place[depth]) for member in group})
    place = (*first.place[:depth], f"[{_ranges(numbers)}]", *first.place[depth + 1 :])
    return Injection(place, first.kind, first.tensors, sum(member.places for member in group))


def _ranges(numbers: list[int]) -> str:
    """0-3, 5 for 0, 1, 2, 3, 5."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)


def as_table(rows: list[dict[str, Any]]) -> Table:
    """Rows of ``Injection.row`` for people."""
    table = Table(box=None, pad_edge=False)
    for name in ("place", "places", "kind", "tensors", "parameters"):
        numbers = name in ("places", "parameters")
        table.add_column(name, justify="right" if numbers else "left", no_wrap=numbers, overflow="fold")
    for row in rows:
        tensors = ", ".join(f"{name} {_shape(shape)}" for name, shape in row["tensors"].items())
        place = row["place"] or "the model"
        table.add_row(place, f"{row['places']:,}", row["kind"], tensors, f"{row['parameters']:,}")
    return table


def _shape(shape: list[int]) -> str:
    return re.sub(r", ", "x", str(shape)).strip("[]")
