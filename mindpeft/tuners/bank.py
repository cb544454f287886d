"""The adapters of one model: kept on the host, put into its slots in turn."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager

import numpy as np
from mindspore import nn

from mindpeft.compiling import forget_compiled_graphs
from mindpeft.config import PeftConfig
from mindpeft.errors import InputError, did_you_mean
from mindpeft.parameters import Place
from mindpeft.precision import widen
from mindpeft.tuners.adapter import Adapter, Part
from mindpeft.tuners.base import Slot, Tensors
from mindpeft.tuners.file_tensors import files_of, values_of
from mindpeft.tuners.hooks import TrainingHook
from mindpeft.tuners.merging import Merging, taken_out
from mindpeft.tuners.plan import BaseModel, Plan
from mindpeft.tuners.rack import Rack, Seat


class AdapterBank:
    """All adapters of a model.

    The active adapters' values live in the slots; ``write_back`` brings them home. Parameters of the base
    model that an adapter replaces (trained biases, saved heads) are swapped with it, while the base's own
    values wait in ``own``; without an adapter the model is exactly the base model, biases and heads included.

    Args:
        model: a bare model; the first adapter freezes its parameters.
        holder: see ``Rack``.
        autocast: keep adapters of half-precision cells in float32.
    """

    def __init__(self, model: nn.Cell, holder: nn.Cell, autocast: bool = True) -> None:
        self.base = BaseModel(model)
        self.rack = Rack(self.base, holder, autocast)
        self.adapters: dict[str, Adapter] = {}
        self.own: Tensors = {}
        self._split: set[str] = set()  # the base parameters that some adapter took something out of
        self.active: list[str] = []
        self.merged: list[str] = []
        self._seats: list[Seat] = []
        self._unmerged: list[tuple[Place, np.ndarray]] = []
        self.enabled = True

    # Adding and removing ----------------------------------------------------------------------------------

    def add(
        self,
        name: str,
        configs: list[PeftConfig],
        tensors: list[Tensors | None] | None,
        trainable: bool,
        slot_rank: int | None = None,
    ) -> None:
        """Add an adapter: fresh, or from the tensors of files. The first one becomes the active one.

        Args:
            name: a new name.
            configs: one for each of its methods.
            tensors: for each config, what its file holds, or ``None`` where it is fresh; ``None``: all are.
            trainable: whether it is trained while it is active.
            slot_rank: keep room for adapters of up to this rank.

        Raises:
            InputError: the name is taken, or config or tensors don't fit; the model is then as it was.
        """
        if name in self.adapters:
            raise InputError(
                f"there is an adapter {name!r} already; choose another name or delete_adapter({name!r})"
            )
        self.require_plain("add an adapter")
        given = [None] * len(configs) if tensors is None else tensors
        plans = [self.base.plan(c, from_file=t is not None) for c, t in zip(configs, given, strict=True)]
        with self._whole_weights():
            adapter = self._made(plans, given, trainable)
        room = [] if slot_rank is None else [self.base.plan(config.roomy(slot_rank)) for config in configs]
        if not self.adapters:
            for parameter in self.base.model.get_parameters():
                parameter.requires_grad = False
        self._settle(adapter, room)
        self.adapters[name] = adapter
        if not self.active:
            self.activate([name])

    def extend(self, name: str, configs: list[PeftConfig]) -> None:
        """Freeze what an adapter has, and add fresh parts to it that are trained; base parameters go on.

        Raises:
            InputError: there is no such adapter, or a config does not fit; the model is then as it was.
        """
        self.require(name)
        self.require_plain("extend an adapter")
        self.write_back()
        plans = [self.base.plan(config) for config in configs]
        with self._whole_weights():
            addition = self._made(plans, [None] * len(plans), True, self.adapters[name].parts)
        adapter = self.adapters[name]
        for part in adapter.parts:
            part.trainable = False
        adapter.parts += addition.parts
        adapter.overrides = addition.overrides | adapter.overrides
        adapter.trainable = True
        self._settle(adapter, [])
        if name in self.active:
            self.activate(self.active)

    def remake(self, name: str, part: Part, config: PeftConfig, given: dict[str, Tensors]) -> None:
        """Give an adapter another part in the place of one of its own, and all slots anew (for other ranks).

        Args:
            name: the adapter.
            part: one of its parts.
            config: the new part's.
            given: path -> tensors that the new part has instead of fresh ones; elsewhere it keeps the part's.
        """
        self.require_plain("change an adapter")
        self.write_back()
        plan = self.base.plan(config)
        with self._whole_weights():
            values = {
                path: {**kind.initial_tensors(plan.sites[path]), **given[path]}
                if path in given
                else part.tensors[path]
                for path, kind in plan.classes.items()
            }
        parts = self.adapters[name].parts
        new = Part(plan, values, part.initial, part.trainable)
        self.adapters[name].parts = [new if other is part else other for other in parts]
        self._seats = []
        self.rack.clear(keep_values=True)
        for adapter in self.adapters.values():
            self.rack.seat(adapter.parts)
        self._show([self.adapters[active] for active in self.active])

    def _settle(self, adapter: Adapter, room: list[Plan]) -> None:
        """Make slots for an adapter, and keep the base model's values of what it replaces."""
        self.rack.seat(adapter.parts, room)
        for part in adapter.parts:
            self.rack.untie(part.plan)
        taken = taken_out(self.base, [adapter])
        self._split |= taken.keys()
        for key in (*adapter.overrides, *taken):
            own = self.own.setdefault(key, self.base.places[key].read())
            if np.array_equal(adapter.overrides.get(key), own):
                adapter.overrides[key] = own  # a fresh one begins as the base model: one copy for both

    def _made(
        self, plans: list[Plan], tensors: list[Tensors | None], trainable: bool, earlier: list[Part] = ()
    ) -> Adapter:
        """The adapter of some plans, or an addition to earlier parts; the model is left as it is."""
        adapter = Adapter([], {}, trainable)
        for index, plan in enumerate(plans):
            plan.config.inference_mode = not trainable
            fresh = tensors[index] is None
            values, overrides = self._fresh(plan) if fresh else self._read(plan, tensors[index])
            initial = {
                path: kind.beginning(plan.sites[path], values[path] if fresh else None)
                for path, kind in plan.classes.items()
                if kind.takes_out(plan.sites[path])
            }
            adapter.parts.append(Part(plan, values, initial))
            adapter.overrides |= overrides
        parts = [*earlier, *adapter.parts]
        for number in range(len(earlier), len(parts)):
            config = parts[number].plan.config
            for frozen in config.frozen_parts([part.plan.config for part in parts[:number]]):
                parts[frozen].trainable = False
        return adapter

    @contextmanager
    def _whole_weights(self) -> Iterator[None]:
        """Inside, nothing is taken out of the base model's weights."""
        self._override([], self._split)
        try:
            yield
        finally:
            self._override([self.adapters[name] for name in self.active], self._split)

    def _fresh(self, plan: Plan) -> tuple[dict[str, Tensors], Tensors]:
        """The tensors and overrides of a new adapter."""
        values = {path: kind.initial_tensors(plan.sites[path]) for path, kind in plan.classes.items()}
        return values, {key: self.own_value(key) for key in sorted(plan.replaced)}

    def _read(self, plan: Plan, tensors: Tensors) -> tuple[dict[str, Tensors], Tensors]:
        """The tensors and overrides of a file's adapter."""
        return values_of(plan, tensors, self.base.places, self.own_value)

    def own_value(self, key: str) -> np.ndarray:
        """The base model's own value of a parameter, whatever adapter is active."""
        return self.own[key].copy() if key in self.own else self.base.places[key].read()

    def delete(self, name: str) -> None:
        """Forget an adapter; if it was the only active one, the first of the others becomes so."""
        self.require(name)
        self.require_plain("delete an adapter")
        self.write_back()
        del self.adapters[name]
        if name in self.active:
            rest = [other for other in self.active if other != name] or list(self.adapters)[:1]
            self.active = []
            self.activate(rest)

    def unload(self, keep_values: bool) -> nn.Cell:
        """Take the layers out again and return the bare model.

        Args:
            keep_values: leave the active adapter's biases and heads in place; else the base's own return.
        """
        if not keep_values:
            self._show([])
        self.rack.clear(keep_values)
        self.active, self._seats = [], []
        return self.base.model

    # Switching: parameter values only ---------------------------------------------------------------------

    def activate(self, names: list[str]) -> None:
        """Make these adapters the active ones, acting in this order.

        Nothing recompiles, unless more act together than ever before or they train with another dropout rate.
        """
        for name in names:
            self.require(name)
        self.require_plain("switch adapters")
        self.write_back()
        self.active = list(names)
        self._show([self.adapters[name] for name in names])

    def write_back(self) -> None:
        """Copy the active adapters' values from the model to the host."""
        if self.merged or not self.enabled:
            return  # what is in the model now is not the adapters'; the host has it
        for seat in self._seats:
            path, plan = seat.slot.path, seat.part.plan
            seat.part.tensors[path] = seat.slot.read(plan.shapes[path])
            if seat.part.hook is not None:
                seat.part.hook.write_back()
        for name in self.active:
            adapter = self.adapters[name]
            adapter.overrides = {key: self.base.places[key].read() for key in adapter.overrides}

    def training_hooks(self) -> list[TrainingHook]:
        """Make anew what the active adapters' methods add to every training step."""
        hooks = []
        for adapter in (self.adapters[name] for name in self.active):
            for part in adapter.parts:
                slots = {seat.slot.path: seat.slot for seat in self._seats if seat.part is part}
                trains = adapter.trainable and part.trainable
                part.hook = part.plan.config.training_hook(slots, part.plan.shapes) if trains else None
                hooks += [part.hook] if part.hook is not None else []
        return hooks

    def _show(self, adapters: list[Adapter]) -> None:
        """Put the values of adapters into the model; none empties the slots and restores the base's own."""
        self._seats = self.rack.seat([part for adapter in adapters for part in adapter.parts])
        training = [adapter for adapter in adapters if adapter.trainable]
        trainable = {id(part) for adapter in training for part in adapter.parts if part.trainable}
        taken = {seat.slot for seat in self._seats}
        for slot in self.rack:
            if slot not in taken:
                slot.fill({}, frozenset())
        stale = self._give_roles(adapters)
        for seat in self._seats:
            slot, tensors = seat.slot, seat.part.tensors[seat.slot.path]
            trains = id(seat.part) in trainable
            slot.fill(tensors, slot.trained(seat.site, tensors) if trains else frozenset())
            stale |= slot.configure(seat.part.plan.config, trains)
        if stale | self._mark_trained(adapters):
            forget_compiled_graphs()
        self._scale(on=True)
        self._override(adapters)

    def _give_roles(self, adapters: list[Adapter]) -> bool:
        """Let slots take in those of earlier parts of the same adapter; return whether graphs are stale."""
        earlier: dict[Slot, list[Slot]] = {}
        for parts in ([id(part) for part in adapter.parts] for adapter in adapters):
            chains: dict[str, list[Slot]] = {}
            for seat in (seat for seat in self._seats if id(seat.part) in parts):
                chain = chains.setdefault(seat.slot.path, [])
                earlier[seat.slot] = list(chain)
                chain.append(seat.slot)
        before = [slot.role for slot in self.rack]
        for slot in self.rack:
            slot.take_in(earlier.get(slot, ()))
        return before != [slot.role for slot in self.rack]

    def _scale(self, on: bool) -> None:
        """Switch the taken slots on or off; the others are always off."""
        wanted = {seat.slot: seat.slot.scaling_of(seat.site) for seat in self._seats} if on else {}
        stale = [slot.set_scaling(wanted.get(slot, 0.0)) for slot in self.rack]
        if any(stale):
            forget_compiled_graphs()

    def _override(self, adapters: list[Adapter], keys: Collection[str] | None = None) -> None:
        """Give base parameters the values that they have with these adapters: all of them, or some."""
        taken = taken_out(self.base, adapters)
        values = {key: self.own[key].astype(np.float32) - value for key, value in taken.items()}
        values |= {key: value for adapter in adapters for key, value in adapter.overrides.items()}
        for key in self.own if keys is None else keys:
            self.base.places[key].write(values.get(key, self.own[key]))

    def _mark_trained(self, adapters: list[Adapter]) -> bool:
        """Thaw base parameters that adapters train; return whether one has another dtype now."""
        trained = set().union(*(adapter.trained for adapter in adapters if adapter.trainable))
        for key in self.own:
            place = self.base.places[key]
            place.parameter.requires_grad = key in trained and not place.is_statistic
        changed = [widen(self.base.places[key].parameter) for key in trained & self.own.keys()]
        return any(changed)

    @contextmanager
    def disabled(self) -> Iterator[None]:
        """The model is the bare base model inside the block; blocks may be nested."""
        if not self.enabled:
            yield
            return
        merged = self.merged
        if merged:
            self.unmerge()
        self.write_back()
        self.enabled = False
        self._scale(on=False)
        self._override([])
        try:
            yield
        finally:
            self.enabled = True
            self._scale(on=True)
            self._override([self.adapters[name] for name in self.active])
            if merged:
                self.merge(merged)

    # Merging ----------------------------------------------------------------------------------------------

    def merge(self, names: list[str] | None = None, safe: bool = False, keep: bool = True) -> None:
        """Merge adapters into the base weights, in float32, and switch the slots off.

        Args:
            names: the adapters; default: the active ones.
            safe: refuse, before anything is changed, if a merged weight would not be finite.
            keep: keep the original weights on the host, so that ``unmerge`` restores them bit by bit.

        Raises:
            InputError: an unknown name, a method that can't be merged, or values that are not finite.
        """
        names = list(self.active if names is None else names)
        for name in names:
            self.require(name)
        self.require_plain("merge")
        self.write_back()
        adapters = [self.adapters[name] for name in names]
        merging = Merging(self.base, list(self.rack.slots), [part for a in adapters for part in a.parts])
        self._override(adapters, self._split)
        try:
            merging.check(safe)
        except InputError:
            self._override([self.adapters[name] for name in self.active], self._split)
            raise
        for place, value in merging.values():
            merging.warn_of_ties(place)
            if keep:
                self._unmerged.append((place, place.read()))
            place.write(value)
        self._scale(on=False)
        self.merged = names

    def unmerge(self) -> None:
        """Restore the weights from before ``merge``, bit by bit, and switch the slots on."""
        for place, value in self._unmerged:
            place.write(value)
        self._unmerged, self.merged = [], []
        self._override([self.adapters[name] for name in self.active], self._split)
        self._scale(on=True)

    # Files ------------------------------------------------------------------------------------------------

    def export(self, name: str, convert: bool = False) -> list[tuple[PeftConfig, Tensors]]:
        """An adapter's configs and tensors, part by part, as they go into files.

        Args:
            convert: as an equal adapter that takes nothing out of the base model's weights.

        Raises:
            InputError: an unknown name, or one that can't be converted.
        """
        self.require(name)
        self.write_back()
        return files_of(name, self.adapters[name], self.own, convert)

    def require(self, name: str) -> None:
        """Raise ``InputError`` unless there is an adapter of that name."""
        if name not in self.adapters:
            known = ", ".join(repr(key) for key in self.adapters) or "none"
            raise InputError(f"no adapter {name!r}{did_you_mean(name, self.adapters)}; there are: {known}")

    def require_plain(self, action: str) -> None:
        """Raise ``InputError`` while the adapters are merged or disabled."""
        if not self.enabled:
            raise InputError(f"can't {action} inside disable_adapter(); leave the block first")
        if self.merged:
            raise InputError(
                f"can't {action} while {', '.join(self.merged)} is merged; call unmerge_adapter() first"
            )
