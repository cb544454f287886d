"""The slots that are in a model: put around its cells, handed out to the adapters that are active."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import mindspore as ms
from mindspore import nn

from mindpeft.cells import put_cell
from mindpeft.compiling import forget_compiled_graphs
from mindpeft.parameters import Place
from mindpeft.tuners.adapter import Part
from mindpeft.tuners.base import Shapes, SharedSlot, Site, Slot, TunerLayer, slot_dtype
from mindpeft.tuners.plan import BaseModel, Plan


@dataclass(frozen=True)
class Seat:
    """A slot, taken by a part of an active adapter."""

    slot: Slot
    part: Part

    @property
    def site(self) -> Site:
        """Where the slot is, for that part."""
        return self.part.plan.sites[self.slot.path]


class Rack:
    """All slots of a model, by path, the innermost first.

    Args:
        base: the bare model.
        holder: has the model as its child ``base_model``, where a layer around the whole model is put.
        autocast: keep slots of half-precision cells in float32.
    """

    def __init__(self, base: BaseModel, holder: nn.Cell, autocast: bool) -> None:
        self.base, self.holder, self.autocast = base, holder, autocast
        self.slots: dict[str, list[Slot]] = {}
        self.version = 0  # counts the changes of the model's structure
        self._tied: list[tuple[Place, ms.Parameter]] = []

    def __iter__(self) -> Iterator[Slot]:
        return (slot for chain in self.slots.values() for slot in chain)

    def layers(self) -> list[str]:
        """The paths of the wrapped cells."""
        return [path for path in self.slots if path]

    def seat(self, parts: list[Part], room: list[Plan] = ()) -> list[Seat]:
        """Find a slot for each place of each part, so that they can be active together.

        Slots that are missing are made, ones that are too small grow; only then are graphs compiled anew.

        Args:
            parts: in the order in which they act, the first one innermost.
            room: further plans that one adapter after another must find room for.
        """
        seats, changed = [], False
        for part in parts:
            found, fresh = self._seat(part.plan, {seat.slot for seat in seats})
            seats += [Seat(slot, part) for slot in found]
            changed |= fresh
        for plan in room:
            changed |= self._seat(plan, set())[1]
        if changed:
            forget_compiled_graphs()
        return seats

    def _seat(self, plan: Plan, taken: set[Slot]) -> tuple[list[Slot], bool]:
        """The slots for a plan, none of those taken, and whether anything in the model changed for them."""
        slots: list[Slot] = []
        shared: SharedSlot | None = None
        changed = False
        for path, kind in sorted(plan.classes.items(), key=lambda item: item[0] != ""):
            shapes = plan.shapes[path]
            slot = self._free(path, kind, shapes, shared, taken)
            if slot is None:
                slot, changed = self._add(path, kind, shapes, shared), True
            changed |= slot.reserve(shapes)
            if isinstance(slot, SharedSlot):
                shared = slot
            slots.append(slot)
        return slots, changed

    def _free(
        self, path: str, kind: type[Slot], shapes: Shapes, shared: SharedSlot | None, taken: set[Slot]
    ) -> Slot | None:
        chain = self.slots.get(path, [])
        # Outside of those of earlier parts: where layers scale or turn, their order matters.
        first = max((number for number, slot in enumerate(chain, 1) if slot in taken), default=0)
        for slot in chain[first:]:
            fits = type(slot) is kind and kind.holds(slot.slot_shapes, shapes)
            if fits and getattr(slot, "shared", None) is shared:
                return slot
        return None

    def _add(self, path: str, kind: type[Slot], shapes: Shapes, shared: SharedSlot | None) -> Slot:
        chain = self.slots.setdefault(path, [])
        cell = self.base.cells[path] if path else self.base.model
        dtype = slot_dtype(cell, self.autocast)
        if issubclass(kind, TunerLayer):
            slot = kind(self.outermost(path), path, shapes, dtype, len(chain), shared)
            slot.set_train(cell.training)
            self.replace(path, slot)
        else:
            slot = kind(path, shapes, dtype, len(chain))
        chain.append(slot)
        self.version += 1
        return slot

    def outermost(self, path: str) -> nn.Cell:
        """The outermost layer around the cell at a path, or the bare cell."""
        layers = [slot for slot in self.slots.get(path, ()) if isinstance(slot, TunerLayer)]
        return layers[-1] if layers else (self.base.cells[path] if path else self.base.model)

    def replace(self, path: str, cell: nn.Cell) -> None:
        """Put a cell at a path; its parameters keep their names."""
        parent_path, _, child = path.rpartition(".")
        if not path:
            put_cell(self.holder, "base_model", cell)
        else:
            put_cell(self.base.cells[parent_path] if parent_path else self.base.model, child, cell)

    def untie(self, plan: Plan) -> None:
        """Give saved cells parameters of their own where others share them (a head tied to an embedding)."""
        places = self.base.places
        shared = {id(place.parameter) for key, place in places.items() if key not in plan.copies}
        for key in plan.copies:
            place = places[key]
            if id(place.parameter) in shared:
                own = ms.Parameter(place.parameter.copy(), name=key, requires_grad=False)
                self._tied.append((place, place.put(own)))
                forget_compiled_graphs()

    def clear(self, keep_values: bool) -> None:
        """Take all layers out again; with ``keep_values`` what was untied stays so."""
        if not keep_values:
            for place, parameter in self._tied:
                place.put(parameter)
        for path, chain in self.slots.items():
            layers = [slot for slot in chain if isinstance(slot, TunerLayer)]
            for layer in layers:
                layer.release()
            if layers:
                self.replace(path, self.base.cells[path] if path else self.base.model)
        self.slots.clear()
        self.version += 1
        forget_compiled_graphs()
