"""mindpeft: parameter-efficient fine-tuning of Hugging Face checkpoints in MindSpore.

The public names are loaded on first use, since importing MindSpore takes seconds.
"""

from __future__ import annotations

import importlib
from typing import Any

_HOMES = {
    "PeftConfig": "mindpeft.config",
    "PeftModel": "mindpeft.peft_model",
    "PeftType": "mindpeft.config",
    "TaskType": "mindpeft.config",
    "get_peft_model": "mindpeft.peft_model",
    "initialize_lora_eva_weights": "mindpeft.tuners.eva",
}

__all__ = list(_HOMES)


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    if name.endswith("Config"):  # a method's config
        methods = importlib.import_module("mindpeft.tuners")
        if hasattr(methods, name):
            return getattr(methods, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    methods = importlib.import_module("mindpeft.tuners")
    return sorted([*globals(), *_HOMES, *(name for name in dir(methods) if name.endswith("Config"))])
