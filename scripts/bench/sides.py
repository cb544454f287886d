"""Two processes that take turns: how the benchmarks compare mindpeft with a peer on a noisy machine."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any


def peak_memory_gb() -> float:
    """The process's peak resident memory (VmHWM) in GB of 1e9 bytes."""
    with open("/proc/self/status") as status:
        line = next(line for line in status if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024 / 1e9


def serve(make_step: Callable[[], Callable[[], float]]) -> None:
    """Run one side: build the step, then run it once for each line on standard input.

    Args:
        make_step: returns a function that runs one step to its end and returns the loss.
    """
    built = time.perf_counter()
    step = make_step()
    _say({"setup": time.perf_counter() - built, "memory": peak_memory_gb()})
    for _ in sys.stdin:
        began, worked = time.perf_counter(), time.process_time()
        loss = step()
        _say(
            {
                "seconds": time.perf_counter() - began,
                "cpu_seconds": time.process_time() - worked,
                "loss": loss,
                "memory": peak_memory_gb(),
            }
        )


def _say(message: dict[str, float]) -> None:
    print("SIDE " + json.dumps(message), flush=True)


class Side:
    """The parent's end of one side."""

    def __init__(self, command: list[str], threads: int):
        environment = {
            **os.environ,
            "OMP_NUM_THREADS": str(threads),
            "OMP_WAIT_POLICY": "passive",
            "GLOG_v": "3",
        }
        self.process = subprocess.Popen(
            [sys.executable, *command],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=environment,
            text=True,
        )
        self.steps: list[dict[str, float]] = []
        self.ready = self._hear()

    def _hear(self) -> dict[str, Any]:
        for line in self.process.stdout:
            if line.startswith("SIDE "):
                return json.loads(line[5:])
        raise SystemExit(f"a side ended with code {self.process.wait()}")

    def step(self) -> None:
        """Let the side run one step while the other waits."""
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        self.steps.append(self._hear())

    def close(self) -> dict[str, float]:
        """End the side and return its figures; the first step, which compiles, stands apart.

        ``memory_before`` is the peak after imports and loading, before any step.
        """
        self.process.stdin.close()
        self.process.wait()
        later = [step["seconds"] for step in self.steps[1:]]
        median = statistics.median(later)
        return {
            "step": median,
            "cpu": statistics.median(step["cpu_seconds"] for step in self.steps[1:]),
            "fastest": min(later),
            "first": self.steps[0]["seconds"],
            "memory": self.steps[-1]["memory"],
            "memory_before": self.ready["memory"],
            "first_loss": self.steps[0]["loss"],
            "last_loss": self.steps[-1]["loss"],
        }


def alternate(ours: list[str], peer: list[str], steps: int, threads: int) -> tuple[dict, dict]:
    """Run both sides' commands, a step of one and a step of the other in turn; return their figures."""
    sides = [Side(ours, threads), Side(peer, threads)]
    for _ in range(steps + 1):
        for side in sides:
            side.step()
    return sides[0].close(), sides[1].close()
