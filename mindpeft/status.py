"""What adapters a model has, and what is injected where: the reports of Hugging Face PEFT."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from mindpeft.tuners.base import SharedSlot

if TYPE_CHECKING:
    from mindpeft.config import PeftConfig
    from mindpeft.tuners.adapter import Adapter
    from mindpeft.tuners.bank import AdapterBank


Named = tuple[str, tuple[int, ...]]  # a tensor's name and shape


@dataclass(frozen=True)
class TunerLayerStatus:
    """What is injected at one place.

    Attributes:
        name: the place's path; "" for the model itself.
        module_type: the method's layer there, such as "LoraLinear"; "saved" for a cell that is trained and
            saved whole, "selected" for parameters trained where they are.
        parameters: adapter -> how many numbers it has there.
        tensors: adapter -> (name, shape) of each of its tensors there.
        enabled: whether adapters are switched on.
        active_adapters: those of ``available_adapters`` that act now.
        merged_adapters: those that are merged.
        requires_grad: adapter -> whether it would be trained when active.
        available_adapters: the adapters that have something there.
    """

    name: str
    module_type: str
    parameters: dict[str, int]
    tensors: dict[str, list[Named]]
    enabled: bool
    active_adapters: list[str]
    merged_adapters: list[str]
    requires_grad: dict[str, bool]
    available_adapters: list[str]


@dataclass(frozen=True)
class TunerModelStatus:
    """What adapters a model has.

    Attributes:
        base_model_type: the base model's class.
        peft_types: adapter -> its method, or its methods joined by " + ".
        trainable_params: numbers that are trained now.
        total_params: all numbers, adapters included.
        num_adapter_layers: places with a layer of a method.
        enabled, active_adapters, merged_adapters, requires_grad, available_adapters: as for one layer.
    """

    base_model_type: str
    peft_types: dict[str, str]
    trainable_params: int
    total_params: int
    num_adapter_layers: int
    enabled: bool
    active_adapters: list[str]
    merged_adapters: list[str]
    requires_grad: dict[str, bool]
    available_adapters: list[str]


class AdapterReports:
    """What a ``PeftModel`` tells about its adapters."""

    _bank: AdapterBank

    @property
    def active_adapter(self) -> str | None:
        """The name of the active adapter, the first if there are several."""
        return self._bank.active[0] if self._bank.active else None

    @property
    def active_adapters(self) -> list[str]:
        """The names of all active adapters, in the order in which they act."""
        return list(self._bank.active)

    @property
    def peft_config(self) -> dict[str, PeftConfig | list[PeftConfig]]:
        """The config of each adapter, with its targets resolved; a list of them for a hybrid."""
        configs = {
            name: [part.plan.config for part in adapter.parts]
            for name, adapter in self._bank.adapters.items()
        }
        return {name: found if len(found) > 1 else found[0] for name, found in configs.items()}

    @property
    def targeted_module_names(self) -> list[str]:
        """The paths of the wrapped cells."""
        return self._bank.rack.layers()

    def get_layer_status(self) -> list[TunerLayerStatus]:
        """What is injected where: a status for each place, in the model's order."""
        return layer_status(self._bank)

    def get_model_status(self) -> TunerModelStatus:
        """What adapters there are, which act, and how many numbers they have."""
        return model_status(self._bank)

    def get_nb_trainable_parameters(self) -> tuple[int, int]:
        """(trainable, all) numbers of parameters; adapters count in their true ranks, as in PEFT."""
        return parameter_counts(self._bank)

    def print_trainable_parameters(self) -> None:
        """Print those numbers and the percentage."""
        trainable, everything = self.get_nb_trainable_parameters()
        share = 100 * trainable / everything
        print(f"trainable params: {trainable:,d} || all params: {everything:,d} || trainable%: {share:.4f}")


def layer_status(bank: AdapterBank) -> list[TunerLayerStatus]:
    """A status for each kind of thing at each place, in the model's order."""
    found: dict[tuple[str, str], dict[str, list[Named]]] = {}
    for name, adapter in bank.adapters.items():
        for path, kind, tensor, shape in _places(adapter):
            found.setdefault((path, kind), {}).setdefault(name, []).append((tensor, shape))
    order = {path: index for index, path in enumerate(["", *bank.base.cells])}
    return [
        TunerLayerStatus(
            name=path,
            module_type=kind,
            parameters={name: sum(math.prod(shape) for _, shape in held) for name, held in tensors.items()},
            tensors=tensors,
            enabled=bank.enabled,
            active_adapters=[name for name in bank.active if name in tensors],
            merged_adapters=[name for name in bank.merged if name in tensors],
            requires_grad={name: bank.adapters[name].trainable for name in tensors},
            available_adapters=list(tensors),
        )
        for (path, kind), tensors in sorted(found.items(), key=lambda item: order[item[0][0]])
    ]


def _places(adapter: Adapter) -> Iterator[tuple[str, str, str, tuple[int, ...]]]:
    """Path, kind, name and shape of every tensor that an adapter has in a model."""
    saved: set[str] = set()
    for part in adapter.parts:
        for path, tensors in part.tensors.items():
            kind = part.plan.classes[path].__name__
            yield from ((path, kind, name, value.shape) for name, value in tensors.items())
        saved |= set(part.plan.copies)
    for key, value in adapter.overrides.items():
        path, _, name = key.rpartition(".")
        yield path, "saved" if key in saved else "selected", name, value.shape


def parameter_counts(bank: AdapterBank) -> tuple[int, int]:
    """(trainable, all) numbers of parameters, as PEFT counts: saved cells are copies beside the base."""
    everything = bank.base.size
    for adapter in bank.adapters.values():
        everything += adapter.size() + bank.base.count(adapter.copies)
    active = [bank.adapters[name] for name in bank.active if bank.adapters[name].trainable]
    trainable = sum(adapter.size(trained=True) + bank.base.count(adapter.trained) for adapter in active)
    return trainable, everything


def model_status(bank: AdapterBank) -> TunerModelStatus:
    """The status of a whole model."""
    trainable, total = parameter_counts(bank)
    layers = {slot.path for slot in bank.rack if not isinstance(slot, SharedSlot)}
    return TunerModelStatus(
        base_model_type=type(bank.base.model).__name__,
        peft_types={
            name: " + ".join(part.plan.config.peft_type.value for part in adapter.parts)
            for name, adapter in bank.adapters.items()
        },
        trainable_params=trainable,
        total_params=total,
        num_adapter_layers=len(layers),
        enabled=bank.enabled,
        active_adapters=list(bank.active),
        merged_adapters=list(bank.merged),
        requires_grad={name: adapter.trainable for name, adapter in bank.adapters.items()},
        available_adapters=list(bank.adapters),
    )
