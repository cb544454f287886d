"""The adapters of one model: planned against it, kept on the host, put into its active slots in turn."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

import mindspore as ms
import numpy as np
from mindspore import nn

from mindpeft.adapter_files import own_name, sort_tensors, stray_names
from mindpeft.config import PeftConfig
from mindpeft.errors import InputError, did_you_mean
from mindpeft.parameters import Place
from mindpeft.tuners.base import Tensors, TunerLayer, slot_dtype
from mindpeft.tuners.plan import BaseModel, Plan


@dataclass
class Adapter:
    """One adapter on the host.

    Attributes:
        plan: what it is.
        layers: path -> its tensors, in their true shapes.
        overrides: base parameter -> its value while this adapter is active.
        trainable: whether its parameters are trained while it is active.
    """

    plan: Plan
    layers: dict[str, Tensors]
    overrides: Tensors = field(default_factory=dict)
    trainable: bool = True

    def scaling(self, path: str) -> float:
        """The scaling at a cell; 0 where the adapter does not reach."""
        layer = self.plan.classes.get(path)
        return layer.scaling_of(self.plan.config, path) if layer else 0.0


class AdapterBank:
    """All adapters of a model.

    The active adapter's values live in the slots; ``write_back`` brings them home. Parameters of the base
    model that an adapter replaces (trained biases, saved heads) are swapped with it, while the base's own
    values wait in ``own``; without an adapter the model is exactly the base model, biases and heads included.

    Args:
        model: a bare model; the first adapter freezes its parameters.
        autocast: keep adapters of half-precision cells in float32.
    """

    def __init__(self, model: nn.Cell, autocast: bool = True) -> None:
        self.autocast = autocast
        self.base = BaseModel(model)
        self.layers: dict[str, TunerLayer] = {}
        self.adapters: dict[str, Adapter] = {}
        self.own: Tensors = {}
        self.active: str | None = None
        self.merged: list[str] = []
        self._unmerged: list[tuple[Place, np.ndarray]] = []
        self._tied: list[tuple[Place, ms.Parameter]] = []
        self._enabled = True

    def plan(self, config: PeftConfig) -> Plan:
        """Work out what a config means for this model; nothing is touched. Raises ``InputError``."""
        return self.base.plan(config, self.layers)

    # Adding and removing ----------------------------------------------------------------------------------

    def add(
        self, name: str, plan: Plan, tensors: Tensors | None, trainable: bool, slot_rank: int | None
    ) -> None:
        """Add an adapter: fresh, or from the tensors of a file. The first one becomes the active one.

        Raises:
            InputError: the name is taken, or the tensors don't fit; the model is then as it was.
        """
        if name in self.adapters:
            raise InputError(
                f"there is an adapter {name!r} already; choose another name or delete_adapter({name!r})"
            )
        self._require_plain("add an adapter")
        adapter = Adapter(plan, {}, {}, trainable)
        if tensors is None:
            adapter.layers = {
                path: cls.initial_tensors(self.base.cells[path], plan.config, path)
                for path, cls in plan.classes.items()
            }
            adapter.overrides = {key: self._own_value(key) for key in sorted(plan.trained)}
        else:
            adapter.layers, adapter.overrides = self._fit(plan, tensors)
        if not self.adapters:
            for parameter in self.base.model.get_parameters():
                parameter.requires_grad = False
        self._make_room(plan, slot_rank)
        self._untie(plan)
        for key in adapter.overrides:
            self.own.setdefault(key, self.base.places[key].read())
        self.adapters[name] = adapter
        if self.active is None:
            self.activate(name)

    def _own_value(self, key: str) -> np.ndarray:
        """The base model's own value of a parameter, whatever adapter is active."""
        return self.own[key].copy() if key in self.own else self.base.places[key].read()

    def _make_room(self, plan: Plan, slot_rank: int | None) -> None:
        """Wrap the cells that aren't yet, and let every slot hold the adapter (and ``slot_rank``)."""
        roomy = plan.config if slot_rank is None else replace(plan.config, r=slot_rank, rank_pattern={})
        changed = False
        for path, layer_class in plan.classes.items():
            cell = self.base.cells[path]
            if path not in self.layers:
                self._wrap(path, layer_class(cell, path, plan.shapes[path], slot_dtype(cell, self.autocast)))
                changed = True
            changed |= self.layers[path].reserve(plan.shapes[path])
            changed |= self.layers[path].reserve(layer_class.tensor_shapes(cell, roomy, path))
        if changed:
            forget_compiled_graphs()

    def _untie(self, plan: Plan) -> None:
        """Give saved cells parameters of their own where others share them (a head tied to an embedding)."""
        shared = {id(place.parameter) for key, place in self.base.places.items() if key not in plan.copies}
        for key in plan.copies:
            place = self.base.places[key]
            if id(place.parameter) in shared:
                own = ms.Parameter(place.parameter.copy(), name=key, requires_grad=False)
                self._tied.append((place, place.put(own)))
                forget_compiled_graphs()

    def _wrap(self, path: str, layer: TunerLayer) -> None:
        layer.set_train(self.base.cells[path].training)
        self._replace(path, layer)
        self.layers[path] = layer

    def _replace(self, path: str, cell: nn.Cell) -> None:
        """Put a cell at a path. MindSpore then renames the parameters under it; the names are put back."""
        names = [(parameter, parameter.name) for parameter in cell.get_parameters()]
        parent_path, _, child = path.rpartition(".")
        parent = self.base.cells[parent_path] if parent_path else self.base.model
        if isinstance(parent, nn.SequentialCell | nn.CellList):
            parent[int(child)] = cell
        else:
            setattr(parent, child, cell)
        for parameter, name in names:
            parameter.name = name

    def delete(self, name: str) -> str | None:
        """Forget an adapter; if it was active, the first of the others becomes so. Returns the active one."""
        self._require(name)
        self._require_plain("delete an adapter")
        self.write_back()
        del self.adapters[name]
        if self.active == name:
            self.active = None
            rest = next(iter(self.adapters), None)
            if rest is None:
                self._show(None)
            else:
                self.activate(rest)
        return self.active

    def unload(self, keep_values: bool) -> nn.Cell:
        """Take the layers out again and return the bare model.

        Args:
            keep_values: leave the active adapter's biases and heads in place; else the base's own return.
        """
        if not keep_values:
            self._show(None)
            for place, parameter in self._tied:
                place.put(parameter)
        for path in self.layers:
            self._replace(path, self.base.cells[path])
        self.layers.clear()
        self.active = None
        forget_compiled_graphs()
        return self.base.model

    # Switching: parameter values only ---------------------------------------------------------------------

    def activate(self, name: str) -> None:
        """Make an adapter the active one. Nothing recompiles, unless it trains with another dropout rate."""
        self._require(name)
        self._require_plain("switch adapters")
        self.write_back()
        self.active = name
        self._show(self.adapters[name])

    def write_back(self) -> None:
        """Copy the active adapter's values from the model to the host."""
        if self.active is None or self.merged or not self._enabled:
            return  # what is in the model now is not the adapter's; the host has it
        adapter = self.adapters[self.active]
        adapter.layers = {
            path: self.layers[path].read(shapes) for path, shapes in adapter.plan.shapes.items()
        }
        adapter.overrides = {key: self.base.places[key].read() for key in adapter.overrides}

    def _show(self, adapter: Adapter | None) -> None:
        """Put an adapter's values into the model; ``None`` empties the slots and restores the base's own."""
        stale = False
        for path, layer in self.layers.items():
            tensors = adapter.layers.get(path, {}) if adapter else {}
            trainable = bool(tensors) and adapter.trainable
            layer.fill(tensors, trainable)
            if trainable:
                stale |= layer.configure(adapter.plan.config)
        self._scale(adapter)
        self._override(adapter)
        self._mark_trained(adapter)
        if stale:
            forget_compiled_graphs()

    def _scale(self, adapter: Adapter | None) -> None:
        for path, layer in self.layers.items():
            layer.set_scaling(adapter.scaling(path) if adapter else 0.0)

    def _override(self, adapter: Adapter | None) -> None:
        for key, own in self.own.items():
            self.base.places[key].write(adapter.overrides.get(key, own) if adapter else own)

    def _mark_trained(self, adapter: Adapter | None) -> None:
        trained = adapter.plan.trained if adapter and adapter.trainable else set()
        for key in self.own:
            self.base.places[key].parameter.requires_grad = (
                key in trained and not self.base.places[key].is_statistic
            )

    @contextmanager
    def disabled(self) -> Iterator[None]:
        """The model is the bare base model inside the block; blocks may be nested."""
        if not self._enabled:
            yield
            return
        merged = self.merged
        if merged:
            self.unmerge()
        self.write_back()
        self._enabled = False
        self._scale(None)
        self._override(None)
        try:
            yield
        finally:
            self._enabled = True
            active = self.adapters[self.active] if self.active else None
            self._scale(active)
            self._override(active)
            if merged:
                self.merge(merged)

    # Merging ----------------------------------------------------------------------------------------------

    def merge(self, names: list[str] | None = None, safe: bool = False, keep: bool = True) -> None:
        """Add adapters' float32 deltas to the base weights and switch the slots off.

        Args:
            names: the adapters; default: the active one.
            safe: refuse, before anything is changed, if a merged weight would not be finite.
            keep: keep the original weights on the host, so that ``unmerge`` restores them bit by bit.
        """
        names = ([self.active] if self.active else []) if names is None else list(names)
        for name in names:
            self._require(name)
        self._require_plain("merge")
        self.write_back()
        if safe:
            for place, value in self._merged_values(names):
                if not np.isfinite(value.astype(np.float32)).all():
                    where = place.parameter.name
                    raise InputError(
                        f"merging {', '.join(names)} gives values that are not finite at {where!r}"
                    )
        for place, value in self._merged_values(names):
            if keep:
                self._unmerged.append((place, place.read()))
            place.write(value)
        self._scale(None)
        self.merged = names

    def _merged_values(self, names: list[str]) -> Iterator[tuple[Place, np.ndarray]]:
        """Each base parameter that the adapters change, with its merged value in its own dtype."""
        for path in self.layers:
            cell, total = self.base.cells[path], {}
            for adapter in (self.adapters[name] for name in names):
                if path in adapter.layers:
                    layer = adapter.plan.classes[path]
                    deltas = layer.deltas(cell, adapter.layers[path], adapter.scaling(path))
                    total = {key: delta + total.get(key, 0) for key, delta in deltas.items()} | {
                        key: delta for key, delta in total.items() if key not in deltas
                    }
            for attribute, delta in total.items():
                place = Place(cell, attribute)
                value = place.parameter.asnumpy()
                yield place, (value.astype(delta.dtype) + delta).astype(value.dtype)

    def unmerge(self) -> None:
        """Restore the weights from before ``merge``, bit by bit, and switch the slots on."""
        for place, value in self._unmerged:
            place.write(value)
        self._unmerged, self.merged = [], []
        self._scale(self.adapters[self.active] if self.active else None)

    # Files ------------------------------------------------------------------------------------------------

    def export(self, name: str) -> Tensors:
        """An adapter's tensors by the names that PEFT writes (without the prefix)."""
        self._require(name)
        self.write_back()
        adapter = self.adapters[name]
        plan, wrapped = adapter.plan, adapter.plan.classes
        tensors = {
            f"{path}.{leaf}": v for path, values in adapter.layers.items() for leaf, v in values.items()
        }
        tensors |= {own_name(key, wrapped): value for key, value in adapter.overrides.items()}
        if getattr(plan.config, "bias", "none") == "all":
            for stray, key, own in stray_names(plan.biases, plan.saved):
                tensors[stray] = self.own[key] if own else adapter.overrides[key]
        return tensors

    def _fit(self, plan: Plan, tensors: Tensors) -> tuple[dict[str, Tensors], Tensors]:
        """A file's tensors as an adapter's layers and overrides; refused if they don't fit the plan."""
        slots = {f"{path}.{leaf}": s for path, shapes in plan.shapes.items() for leaf, s in shapes.items()}
        found, own = sort_tensors(tensors, slots, self.base.places, plan.copies)
        layers = {
            path: {leaf: found[f"{path}.{leaf}"].astype(np.float32) for leaf in shapes}
            for path, shapes in plan.shapes.items()
        }
        # PEFT saves whole embeddings beside an adapter that targets one; what the base has anyway is let go.
        kept = {
            key: value
            for key, value in own.items()
            if key in plan.trained or not np.array_equal(value, self._own_value(key).astype(value.dtype))
        }
        return layers, {**{key: self._own_value(key) for key in plan.biases}, **kept}

    # Counting and checking --------------------------------------------------------------------------------

    def count(self) -> tuple[int, int]:
        """(trainable, all) numbers of parameters, as PEFT counts: saved cells are copies beside the base."""
        everything = self.base.size
        for adapter in self.adapters.values():
            everything += _size(adapter) + self.base.count(adapter.plan.copies)
        active = self.adapters.get(self.active)
        if active is None or not active.trainable:
            return 0, everything
        return _size(active) + self.base.count(active.plan.trained), everything

    def _require(self, name: str) -> None:
        if name not in self.adapters:
            known = ", ".join(repr(key) for key in self.adapters) or "none"
            raise InputError(f"no adapter {name!r}{did_you_mean(name, self.adapters)}; there are: {known}")

    def _require_plain(self, action: str) -> None:
        if not self._enabled:
            raise InputError(f"can't {action} inside disable_adapter(); leave the block first")
        if self.merged:
            raise InputError(
                f"can't {action} while {', '.join(self.merged)} is merged; call unmerge_adapter() first"
            )


def _size(adapter: Adapter) -> int:
    """How many numbers an adapter's own tensors hold."""
    return sum(value.size for values in adapter.layers.values() for value in values.values())


def forget_compiled_graphs() -> None:
    """Make every cell and every ``mindspore.jit`` function compile anew at its next call.

    MindSpore's cache key leaves out a cell's structure and its parameters' shapes: after a change of either
    it would run the old graph and give wrong results in silence. A change of *values* needs none of this.
    """
    # The module that keeps the caches moved between MindSpore's versions; the executor's class moved with it.
    # A lasting reference to the module of Cell would make every cell complain when the interpreter exits.
    executor = sys.modules[nn.Cell.__module__]._cell_graph_executor
    api = sys.modules[type(executor).__module__]
    api.ms_compile_cache.clear()
    for graphs in api.cells_compile_cache.values():
        graphs.clear()
