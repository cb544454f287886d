"""Products with weights in float32, in float32 on matrix units (AMX), and in bfloat16: GFLOP/s.

    python scripts/bench/products.py

Each kind in a process of its own, since the environment tells which units are used; the fastest of some calls
of the layer's operator, with MindSpore's share of it.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time

import numpy as np

# Rows, inputs, outputs: layers of BERT-base and of Qwen2.5-0.5B's shape.
SHAPES = [(1024, 768, 768), (1024, 768, 3072), (1024, 3072, 768), (1024, 896, 4864), (1024, 4864, 896)]
KINDS = {
    "float32": ("float32", {}),
    "float32, matrix units": ("float32", {"MINDPEFT_AMX": "float32"}),
    "bfloat16": ("bfloat16", {}),
}
CALLS = 15


def measure(dtype: str) -> list[float]:
    """GFLOP/s of each of ``SHAPES`` with weights of a dtype."""
    import mindspore as ms

    from mindpeft.device import setup_device
    from mindpeft.ops.linear import Product

    setup_device("CPU")
    product, random, speeds = Product(), np.random.default_rng(0), []
    for rows, inputs, outputs in SHAPES:
        x = ms.Tensor(random.normal(size=(rows, inputs)).astype(np.float32))
        weight = ms.Tensor(random.normal(size=(outputs, inputs)).astype(np.float32)).astype(
            getattr(ms, dtype)
        )
        seconds = min(_seconds(product, x, weight) for _ in range(CALLS))
        speeds.append(2 * rows * inputs * outputs / seconds / 1e9)
    return speeds


def _seconds(product, x, weight) -> float:
    from mindpeft.ops.device import synchronize

    began = time.perf_counter()
    product(x, weight)
    synchronize()
    return time.perf_counter() - began


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--dtype", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.dtype:
        print(json.dumps(measure(arguments.dtype)))
        return
    print(
        f"{'rows x inputs x outputs':26}" + "".join(f"{' x '.join(map(str, shape)):>20}" for shape in SHAPES)
    )
    for name, (dtype, settings) in KINDS.items():
        command = [sys.executable, __file__, "--dtype", dtype]
        environment = {**os.environ, "GLOG_v": "3", **settings}
        output = subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout
        print(f"{name:26}" + "".join(f"{speed:20.0f}" for speed in json.loads(output.splitlines()[-1])))


if __name__ == "__main__":
    main()
