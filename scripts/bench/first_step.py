"""Where the seconds of the first training step go: imports, the model, compilation, the step itself.

    python scripts/bench/first_step.py                          # BERT-base
    python scripts/bench/first_step.py --shape qwen2.5-0.5b --repeat 1

The shapes are those of train_step.py. Each line is of fresh processes, the median of some: with each layer
compiled by itself, with equal layers compiled once (the default), and from the compile cache.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from train_step import SHAPES, checkpoint, mindpeft_step

PARTS = ("imports", "model", "compile", "step", "first step", "peak memory, GB")
STEPS = 4


def measure(folder: str, shape: str) -> dict[str, float]:
    """The parts of one process."""
    began = time.perf_counter()
    from sides import peak_memory_gb

    import mindpeft.models
    import mindpeft.train.step  # noqa: F401

    imported = time.perf_counter()
    step = mindpeft_step(folder, SHAPES[shape])
    opened = time.perf_counter()
    seconds = [_seconds(step) for _ in range(STEPS)]
    later = statistics.median(seconds[1:])
    parts = (imported - began, opened - imported, seconds[0] - later, later, seconds[0], peak_memory_gb())
    return dict(zip(PARTS, parts, strict=True))


def _seconds(step) -> float:
    began = time.perf_counter()
    step()
    return time.perf_counter() - began


def in_a_process(folder: str, shape: str, **settings: str) -> dict[str, float]:
    """`measure` in a fresh process with other environment variables."""
    command = [sys.executable, __file__, "--shape", shape, "--folder", folder]
    environment = {**os.environ, "OMP_NUM_THREADS": "2", "GLOG_v": "3", **settings}
    output = subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout
    return json.loads(output.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shape", choices=list(SHAPES), default="bert-base")
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.folder:
        print(json.dumps(measure(arguments.folder, arguments.shape)))
        return
    with tempfile.TemporaryDirectory() as scratch:
        folder, cache = (
            checkpoint(SHAPES[arguments.shape], Path(scratch)),
            {"MINDPEFT_COMPILE_CACHE": f"{scratch}/cache"},
        )
        in_a_process(folder, arguments.shape, **cache)  # fills it
        kinds = {
            "each layer by itself": {"MINDPEFT_SHARE_LAYERS": "0"},
            "equal layers once": {},
            "cache": cache,
        }
        rounds = [
            {name: in_a_process(folder, arguments.shape, **settings) for name, settings in kinds.items()}
            for _ in range(arguments.repeat)
        ]
    print(f"{arguments.shape}, seconds, medians of {arguments.repeat} processes")
    print(f"{'':22}" + "".join(f"{part:>17}" for part in PARTS))
    for name in kinds:
        medians = (statistics.median(found[name][part] for found in rounds) for part in PARTS)
        print(f"{name:22}" + "".join(f"{median:17.2f}" for median in medians))


if __name__ == "__main__":
    main()
