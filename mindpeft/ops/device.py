"""Which device the arithmetic is written for."""

from __future__ import annotations

import mindspore as ms


def on_cpu() -> bool:
    """Whether the device is the CPU, whose built-in operators need other choices than an accelerator's."""
    return ms.get_context("device_target") == "CPU"
