"""Which device the arithmetic is written for, and waiting for it."""

from __future__ import annotations

import mindspore as ms
from mindspore.runtime import stream


def on_cpu() -> bool:
    """Whether the device is the CPU, whose built-in operators need other choices than an accelerator's."""
    return ms.get_context("device_target") == "CPU"


def synchronize() -> None:
    """Wait until what was asked of the device is done.

    ``mindspore.runtime.synchronize`` does so on the CPU from its second call on; the first logs an error.
    """
    getattr(stream, "synchronize_", ms.runtime.synchronize)()
