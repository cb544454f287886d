"""Layer freezing, and full fine-tuning: parameters of the base model are trained where they are.

Both keep what they train as an adapter, so that it can be switched, disabled and saved alone. Hugging Face
PEFT has neither; the folder has PEFT's shape, its tensors are the trained values by their names:

base_model.model.<path>.<parameter>

Running statistics (batch normalisation) are never trained, but kept and saved with the adapter.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from mindpeft.config import PeftType, register_method
from mindpeft.errors import InputError
from mindpeft.targets import layer_index
from mindpeft.tuners.base import is_embedding
from mindpeft.tuners.selection import SelectionConfig

if TYPE_CHECKING:
    from mindpeft.tuners.plan import BaseModel

EMBEDDINGS = "embeddings"
_MOST_LAYERS = 10_000  # indices are kept one by one


@register_method
@dataclass
class FullConfig(SelectionConfig):
    """Full fine-tuning: every parameter is trained, or those that are named.

    Memory: the host holds another copy of what is trained, the base model's own values, and from the first
    time that the adapter is saved or another one is active a third; the optimizer has two more numbers for
    each. Meant for small models, or for parts.

    Attributes:
        target_modules: only these cells (with all inside them) or parameters: names or dotted suffixes, a
            regular expression for the full path, or "embeddings" for all embedding tables; ``None`` for all.
        exclude_modules: cells and parameters left frozen, given the same way.
        modules_to_save: cells trained and saved whole besides; a tied one gets parameters of its own.

    Raises:
        InputError: a value is not allowed; for a model, that nothing is left to train.
    """

    METHOD: ClassVar[PeftType] = PeftType.FULL
    IN_PEFT: ClassVar[bool] = False

    def resolve(self, base: BaseModel) -> None:
        if self.target_modules == EMBEDDINGS:
            self.target_modules = {name for name, cell in base.cells.items() if is_embedding(cell)}


@register_method
@dataclass
class LayerFreezingConfig(FullConfig):
    """Layer freezing: some layers are left as they are, everything else is trained.

    Memory: as for ``FullConfig``.

    Attributes:
        freeze_layers: 3 for the first three layers, or a list of indices and of [first, last + 1] ranges,
            such as [0, [4, 8]]. A layer's index is the first number in a name, as in PEFT.
        layers_pattern: the name before the layer index ("encoder.block"), where a model has several stacks.
        exclude_modules: cells and parameters frozen besides (the embeddings, say): names or dotted suffixes,
            or a regular expression for the full path.
        target_modules: train these alone, as far as they are not frozen; given the same way.
        modules_to_save: cells trained and saved whole in any case.

    Raises:
        InputError: a value is not allowed; for a model, that a layer is not there or that nothing is left.
    """

    freeze_layers: int | list[int | list[int]] | None = None
    layers_pattern: list[str] | str | None = None

    METHOD: ClassVar[PeftType] = PeftType.FREEZE
    EXAMPLE: ClassVar[Mapping[str, Any]] = {"exclude_modules": ["embeddings"]}

    def _check_layers(self) -> None:
        if self.freeze_layers is None and not self.exclude_modules:
            raise InputError("FREEZE needs freeze_layers or exclude_modules: what to freeze")
        if self.layers_pattern and self.freeze_layers is None:
            raise InputError("layers_pattern needs freeze_layers: the layers to freeze")
        self.frozen_layers()

    def frozen_layers(self) -> set[int]:
        """The indices of the frozen layers. Raises ``InputError`` for anything but indices and ranges."""
        frozen = self.freeze_layers
        entries = [] if frozen is None else [[0, frozen]] if _is_count(frozen) else frozen
        if not isinstance(entries, list | tuple) or (frozen is not None and not entries):
            raise _odd_layers(frozen)
        indices: set[int] = set()
        for entry in entries:
            pair = [entry, entry + 1] if _is_count(entry) else entry
            if not isinstance(pair, list | tuple) or len(pair) != 2 or not all(map(_is_count, pair)):
                raise _odd_layers(frozen)
            if pair[0] >= pair[1]:
                raise InputError(f"freeze_layers has an empty range: {entry!r}")
            if pair[1] > _MOST_LAYERS:
                raise InputError(f"freeze_layers must stay below {_MOST_LAYERS} layers, not {entry!r}")
            indices.update(range(*pair))
        return indices

    def suits(self, name: str) -> bool:
        return layer_index(name, self.layers_pattern) not in self.frozen_layers()

    def selected(self, base: BaseModel, wrapped: Collection[str]) -> list[str]:
        present = {layer_index(name, self.layers_pattern) for name in base.places} - {None}
        absent = self.frozen_layers() - present
        if absent:
            there = f"layers {min(present)} to {max(present)}" if present else "no layers"
            raise InputError(
                f"freeze_layers names layer {min(absent)}, but the model has {there} with "
                f"layers_pattern={self.layers_pattern!r} (what stands before the index)"
            )
        return super().selected(base, wrapped)


def _is_count(value: Any) -> bool:
    return type(value) is int and value >= 0


def _odd_layers(value: Any) -> InputError:
    return InputError(
        "freeze_layers must be how many of the first layers to freeze, or a list of indices and of "
        f"[first, last + 1] ranges, not {value!r}"
    )
