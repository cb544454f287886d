"""LoRA that acts from the start, for tests of what is done with adapters."""

from __future__ import annotations

from typing import Any

from mindspore import nn

from mindpeft import LoraConfig


def config(**options: Any) -> LoraConfig:
    """A config whose fresh adapter is random, on query and value unless other targets are given."""
    return LoraConfig(**{"target_modules": ["query", "value"], "init_lora_weights": False, **options})


def graphs(*cells: nn.Cell) -> int:
    """How many graphs these cells have compiled."""
    return sum(len(cell.compile_cache) for cell in cells)
