"""Waiting for the device."""

from __future__ import annotations

import subprocess
import sys

WAIT = """
import mindspore as ms, numpy as np
from mindpeft.ops.device import synchronize
from mindpeft.parameters import assign
value = ms.Parameter(ms.Tensor(np.zeros(5, np.float32)))
assign(value, np.ones(5, np.float32))
synchronize()
print(value.asnumpy().sum())
"""


def test_nothing_is_logged():
    """The first call of MindSpore's own function in a process logs an error on the CPU, and does not wait."""
    done = subprocess.run([sys.executable, "-c", WAIT], capture_output=True, text=True, check=True)
    assert done.stdout.split()[-1] == "5.0"
    assert "ERROR" not in done.stdout + done.stderr
