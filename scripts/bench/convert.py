"""Converting a checkpoint of 2 GB in shards: seconds and peak memory, beside safetensors' own load and save.

    python scripts/bench/convert.py                      # makes the checkpoint in a temporary folder
    python scripts/bench/convert.py --gigabytes 0.5 --runs 1

Both sides run in their own process, in turn: mindpeft writes the whole checkpoint again, tensor by tensor;
the peer loads each shard with safetensors.torch and saves it. Needs the test extra and room on disk.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from sides import peak_memory_gb

SHARDS, WIDTH = 4, 4096


def make(folder: Path, gigabytes: float) -> int:
    """Write random float32 shards with their index; returns the bytes of the largest tensor."""
    import torch
    from safetensors.torch import save_file

    rows = int(gigabytes * 1e9 / SHARDS / 8 / WIDTH / 4)  # eight tensors a shard
    random, places = np.random.default_rng(0), {}
    for shard in range(SHARDS):
        name = f"model-{shard + 1:05d}-of-{SHARDS:05d}.safetensors"
        tensors = {
            f"model.layers.{shard * 8 + i}.weight": torch.from_numpy(
                random.random((rows, WIDTH), dtype=np.float32)
            )
            for i in range(8)
        }
        save_file(tensors, folder / name, metadata={"format": "pt"})
        places |= dict.fromkeys(tensors, name)
    index = {"metadata": {"total_size": SHARDS * 8 * rows * WIDTH * 4}, "weight_map": places}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return rows * WIDTH * 4


def run_mindpeft(source: Path, target: Path) -> None:
    from mindpeft.convert.writer import convert_checkpoint

    convert_checkpoint(source, target, max_shard_size="600MB")


def run_torch(source: Path, target: Path) -> None:
    from safetensors.torch import load_file, save_file

    target.mkdir()
    for path in sorted(source.glob("*.safetensors")):
        save_file(load_file(path), target / path.name, metadata={"format": "pt"})
        with open(target / path.name, "rb") as file:
            os.fsync(file.fileno())  # as mindpeft does


SIDES = {"mindpeft": run_mindpeft, "torch": run_torch}


def timed(side: str, source: Path, target: Path) -> dict[str, float]:
    """One run of a side in a process of its own."""
    command = [sys.executable, __file__, "--side", side, str(source), str(target)]
    result = subprocess.run(command, check=True, capture_output=True, text=True)
    shutil.rmtree(target)
    return json.loads(result.stdout.splitlines()[-1])


def warm(source: Path, target: Path) -> None:
    """Write and delete as many bytes: a virtual machine is slow to come by memory for files."""
    scratch, block = target.with_suffix(".warm"), bytes(1 << 23)
    with open(scratch, "wb") as file:
        for _ in range(sum(path.stat().st_size for path in source.iterdir()) // len(block)):
            file.write(block)
    scratch.unlink()


def measure(side: str, source: Path, target: Path) -> None:
    """The child: imports first, then the clock."""
    if side == "torch":
        import safetensors.torch  # noqa: F401
    else:
        import mindpeft.convert.writer  # noqa: F401
    warm(source, target)
    before, began = peak_memory_gb(), time.perf_counter()
    SIDES[side](source, target)
    seconds = time.perf_counter() - began
    print(json.dumps({"seconds": seconds, "memory": peak_memory_gb(), "imports": before}))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--gigabytes", type=float, default=2.0)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--side", nargs=3, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.side:
        measure(arguments.side[0], Path(arguments.side[1]), Path(arguments.side[2]))
        return
    with tempfile.TemporaryDirectory() as scratch:
        source, target = Path(scratch) / "source", Path(scratch) / "target"
        source.mkdir()
        largest = make(source, arguments.gigabytes)
        found = {side: [] for side in SIDES}
        for _ in range(arguments.runs):
            for side in SIDES:
                found[side].append(timed(side, source, target))
    print(f"{arguments.gigabytes} GB in {SHARDS} shards, largest tensor {largest / 1e6:.0f} MB")
    print(f"{'':30}{'mindpeft':>12}{'safetensors':>14}")
    for key, unit in (("seconds", "s"), ("memory", "GB, peak"), ("imports", "GB, after imports")):
        values = [statistics.median(run[key] for run in found[side]) for side in SIDES]
        print(f"{key + ' (' + unit + ')':30}{values[0]:12.2f}{values[1]:14.2f}")


if __name__ == "__main__":
    main()
