from __future__ import annotations

import subprocess
import sys

import mindspore as ms
import pytest

from mindpeft import device
from mindpeft.errors import InputError


def test_auto_takes_the_best_present(monkeypatch):
    present = device.available_devices()
    assert present[-1] == "CPU"
    chosen = []
    monkeypatch.setattr(ms, "set_device", lambda *args: chosen.append(args))
    monkeypatch.setattr(device, "_is_available", lambda name: name == "GPU")
    assert device.setup_device("auto", 1) == "GPU"
    assert chosen == [("GPU", 1)]
    assert device.setup_device("cpu") == "CPU"


def test_absent_and_unknown_devices_are_refused(monkeypatch):
    monkeypatch.setattr(device, "_is_available", lambda name: False)
    with pytest.raises(InputError, match="'Ascend' is absent"):
        device.setup_device("Ascend")
    with pytest.raises(InputError, match="did you mean 'Ascend'"):
        device.setup_device("Ascent")
    with pytest.raises(InputError, match="unknown mode"):
        device.setup_device("CPU", mode="eager")


def test_a_driver_that_fails_is_one_sentence(monkeypatch):
    def fail(*args):
        raise RuntimeError("no such card\nC++ stack")

    monkeypatch.setattr(ms, "set_device", fail)
    with pytest.raises(InputError, match=r"^can't use device CPU 7: no such card$"):
        device.setup_device("CPU", 7)


def test_modes_and_report():
    device.setup_device("CPU", mode="pynative", seed=1)
    assert device.device_report()["mode"] == "pynative"
    device.setup_device("CPU")
    report = device.device_report()
    assert (report["mode"], report["device_in_use"], report["mindspore"]) == ("graph", "CPU", ms.__version__)


def test_the_log_goes_to_standard_error_in_plain_lines():
    code = "from mindpeft.console import logger as a; a.info('[a] 1%s', 2); a.warning('b'); a.debug('c')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == ("", "[a] 12\nwarning: b\n")
