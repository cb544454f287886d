"""Putting loaded bottleneck adapters and an AdapterFusion together into one adapter."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from mindpeft.config import PeftConfig
from mindpeft.errors import InputError
from mindpeft.tuners.adapter import Part
from mindpeft.tuners.adapter_fusion import AdapterFusionConfig
from mindpeft.tuners.bank import AdapterBank
from mindpeft.tuners.base import Tensors
from mindpeft.tuners.bottleneck import BottleneckConfig


def add_fusion_adapter(
    bank: AdapterBank, names: Sequence[str], adapter_name: str, config: AdapterFusionConfig | None = None
) -> None:
    """Add an adapter that mixes others; see ``PeftModel.add_fusion_adapter``."""
    if not isinstance(config, AdapterFusionConfig | None):
        raise InputError(f"a fusion needs an AdapterFusionConfig, not {type(config).__name__}")
    if not names:
        raise InputError("a fusion needs the names of the adapters that it mixes, at least one")
    bank.write_back()
    parts = [_part(bank, name) for name in names]
    places = parts[-1].plan.config
    about = {key: getattr(places, key) for key in ("mh_adapter", "output_adapter")}
    fusion = replace(
        config or AdapterFusionConfig(adapter_names=list(names)), adapter_names=list(names), **about
    )
    configs: list[PeftConfig] = [
        replace(part.plan.config, modules_to_save=None, task_type=None) for part in parts
    ]
    bank.add(adapter_name, [*configs, fusion], [*map(_tensors, parts), None], not fusion.inference_mode)


def _part(bank: AdapterBank, name: str) -> Part:
    """The one part of a bottleneck adapter."""
    bank.require(name)
    parts = bank.adapters[name].parts
    if len(parts) > 1 or not isinstance(parts[0].plan.config, BottleneckConfig):
        methods = " and ".join(part.plan.config.peft_type.value for part in parts)
        raise InputError(f"a fusion mixes bottleneck adapters alone, but {name!r} is of {methods}")
    return parts[0]


def _tensors(part: Part) -> Tensors:
    """A part's own tensors as its file names them."""
    return {
        f"{path}.{leaf}" if path else leaf: value
        for path, tensors in part.tensors.items()
        for leaf, value in tensors.items()
    }
