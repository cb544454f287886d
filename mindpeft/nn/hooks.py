"""Hooks that are registered on Cells."""

from __future__ import annotations

import mindspore.nn as nn

_HOOKS = ("_forward_pre_hook", "_forward_hook", "_backward_pre_hook", "_backward_hook")


def is_listened_to(cell: nn.Cell) -> bool:
    """Whether a hook sees a Cell's calls."""
    return any(getattr(cell, hooks, None) for hooks in _HOOKS)
