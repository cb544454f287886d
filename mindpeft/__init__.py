"""mindpeft: parameter-efficient fine-tuning of Hugging Face checkpoints in MindSpore.

The public names are loaded on first use, since importing MindSpore takes seconds.
"""

from __future__ import annotations

import importlib
from typing import Any

_HOMES = {
    "LoraConfig": "mindpeft.tuners.lora",
    "PeftConfig": "mindpeft.config",
    "PeftModel": "mindpeft.peft_model",
    "PeftType": "mindpeft.config",
    "TaskType": "mindpeft.config",
    "get_peft_model": "mindpeft.peft_model",
}

__all__ = list(_HOMES)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES])
