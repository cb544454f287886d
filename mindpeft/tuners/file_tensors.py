"""Between an adapter and its files: which tensors are written, and what those of a file are."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np

from mindpeft.adapter_files import own_name, sort_tensors, stray_names
from mindpeft.config import PeftConfig
from mindpeft.errors import InputError
from mindpeft.parameters import Place
from mindpeft.tuners.adapter import Adapter, Part
from mindpeft.tuners.base import Tensors
from mindpeft.tuners.plan import Plan


def files_of(
    name: str, adapter: Adapter, own: Tensors, convert: bool = False
) -> list[tuple[PeftConfig, Tensors]]:
    """An adapter's configs and tensors, part by part, as they go into files.

    Args:
        name: of the adapter, for messages.
        own: the base model's own values of the parameters that adapters replace.
        convert: as an equal adapter that takes nothing out of the base model's weights.

    Raises:
        InputError: the adapter can't be converted.
    """
    if convert and not adapter.takes_out:
        raise InputError(
            f"the adapter {name!r} can't be converted: it takes nothing out of the base model's weights "
            '(init_lora_weights "pissa" or "olora" does)'
        )
    written = []
    for part in adapter.parts:
        config, tensors = part.plan.config, part.tensors
        if convert and part.initial:
            config, tensors = config.converted(tensors, part.initial)
        written.append(_file_of(adapter, part, config, tensors, own))
    return written


def _file_of(
    adapter: Adapter, part: Part, config: PeftConfig, tensors: dict[str, Tensors], own: Tensors
) -> tuple[PeftConfig, Tensors]:
    plan, overrides = part.plan, adapter.overrides
    written = {path: kind.to_file(plan.sites[path], tensors[path]) for path, kind in plan.classes.items()}
    replaced = set(plan.replaced)
    if part is adapter.parts[0]:
        replaced |= overrides.keys() - adapter.replaced  # of no part: what a file had besides
    cells = {f"{path}.{leaf}": value for path in plan.wrapped for leaf, value in written[path].items()}
    cells |= {own_name(key, plan.wrapped): overrides[key] for key in sorted(replaced)}
    if getattr(plan.config, "bias", "none") == "all":
        for stray, key, is_own in stray_names(plan.selected, plan.saved):
            cells[stray] = own[key] if is_own else overrides[key]
    config = config.for_file(written)
    shared = {config.SHARED_PREFIX + leaf: value for leaf, value in written.get("", {}).items()}
    named = {config.CELL_PREFIX + name: value for name, value in cells.items()}
    return config, config.in_file(shared | named)


def values_of(
    plan: Plan, tensors: Tensors, places: Mapping[str, Place], own_value: Callable[[str], np.ndarray]
) -> tuple[dict[str, Tensors], Tensors]:
    """A file's tensors as an adapter's tensors, by path, and what it replaces of the base model.

    Args:
        plan: of the file's config.
        tensors: by the file's names.
        places: the base model's parameters.
        own_value: gives the base model's own value of one.

    Raises:
        InputError: they don't fit the plan.
    """
    names = {
        path: {leaf: f"{path}.{leaf}" if path else leaf for leaf in shapes}
        for path, shapes in plan.shapes.items()
    }
    slots = {names[path][leaf]: s for path, shapes in plan.shapes.items() for leaf, s in shapes.items()}
    required = plan.copies if plan.classes else sorted(plan.replaced)
    found, own = sort_tensors(tensors, slots, places, required)
    values = {path: {leaf: found[name] for leaf, name in leaves.items()} for path, leaves in names.items()}
    for path, kind in plan.classes.items():
        kind.check_values(plan.sites[path], values[path])
        values[path] = {leaf: _widened(value) for leaf, value in values[path].items()}
    # PEFT saves whole embeddings beside an adapter that targets one; what the base has anyway is let go.
    kept = {
        key: value
        for key, value in own.items()
        if key in plan.replaced or not np.array_equal(value, own_value(key).astype(value.dtype))
    }
    return values, {**{key: own_value(key) for key in plan.selected}, **kept}


def _widened(value: np.ndarray) -> np.ndarray:
    """Floats in float32; whole numbers (indices) as they are, which float32 would round above 2^24."""
    return value.astype(np.float32) if value.dtype.kind == "f" else value
