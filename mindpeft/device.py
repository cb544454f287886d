"""Which device MindSpore runs on, and in which mode."""

from __future__ import annotations

import contextlib
import io
import os
import platform
from typing import Any

import mindspore as ms

from mindpeft.errors import InputError, did_you_mean

DEVICES = ("Ascend", "GPU", "CPU")  # the best first
_MODES = {"graph": ms.GRAPH_MODE, "pynative": ms.PYNATIVE_MODE}


def available_devices() -> list[str]:
    """The devices whose plugin loads and that are present, the best first; always holds ``"CPU"``."""
    return [device for device in DEVICES if device == "CPU" or _is_available(device)]


def _is_available(device: str) -> bool:
    """Ask MindSpore; a wheel whose plugin for the device is absent or doesn't load raises or answers no."""
    with contextlib.redirect_stdout(io.StringIO()):
        try:
            return bool(ms.hal.is_available(device))
        except (RuntimeError, ValueError):
            return False


def setup_device(
    device: str = "auto", device_id: int | None = None, mode: str = "graph", seed: int | None = None
) -> str:
    """Choose device and execution mode for this process; call it before the first tensor is made.

    Args:
        device: ``"Ascend"``, ``"GPU"``, ``"CPU"``, or ``"auto"`` for the best one present.
        device_id: which of several; None leaves the choice to MindSpore (and to ``msrun``).
        mode: ``"graph"`` or ``"pynative"``.
        seed: seeds MindSpore and NumPy's global generator.

    Returns:
        The device chosen.

    Raises:
        InputError: unknown name, or the device is not present.
    """
    if mode not in _MODES:
        raise InputError(f"unknown mode {mode!r}: choose graph or pynative{did_you_mean(mode, _MODES)}")
    chosen = _choose(device)
    if not _is_in_use(chosen, device_id):
        _set_device(chosen, device_id)
    ms.set_context(mode=_MODES[mode])
    if seed is not None:
        ms.set_seed(seed)
    return chosen


def _is_in_use(device: str, device_id: int | None) -> bool:
    """Whether nothing has to be set; MindSpore refuses to, even to the same, once it has run something."""
    is_same_card = device_id is None or device_id == ms.get_context("device_id")
    return device == ms.get_context("device_target") and is_same_card


def _set_device(device: str, device_id: int | None) -> None:
    place = (device,) if device_id is None else (device, device_id)
    try:
        ms.set_device(*place)
    except (RuntimeError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise InputError(f"can't use device {' '.join(map(str, place))}: {reason}") from error


def _choose(device: str) -> str:
    names = {name.lower(): name for name in ("auto", *DEVICES)}
    name = names.get(str(device).lower())
    if name is None:
        choices = ", ".join(names.values())
        raise InputError(
            f"unknown device {device!r}: choose from {choices}{did_you_mean(device, names.values())}"
        )
    present = available_devices()
    if name == "auto":
        return present[0]
    if name not in present:
        raise InputError(
            f"device {name!r} is absent or its driver does not load; present: {', '.join(present)}"
        )
    return name


def device_report() -> dict[str, Any]:
    """What a bug report should say about this machine: versions, devices present and in use, threads."""
    import numpy

    from mindpeft.ops.cpu.library import library

    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "mindspore": ms.__version__,
        "numpy": numpy.__version__,
        "devices_present": available_devices(),
        "device_in_use": ms.get_context("device_target"),
        "mode": "graph" if ms.get_context("mode") == ms.GRAPH_MODE else "pynative",
        "cpu_count": os.cpu_count(),
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS"),
        "cpu_operators": library().describe(),
    }
