"""What LoftQ makes of a weight in the last Hugging Face PEFT that quantises without a GPU, for the tests.

PEFT since 0.20 leaves the quantisation to bitsandbytes, on a GPU. Run this in an environment of its own:

    pip install torch==2.13.0 peft==0.18.1 scipy
    python scripts/loftq_oracle.py tests/tuners/data/loftq.safetensors

For each case it stores the quantised weight's values and the product B A.
"""

from __future__ import annotations

import argparse
import sys
import types

import numpy as np
import torch
from peft.utils import loftq_utils
from safetensors.numpy import save_file

CASES = {
    "two": (2, 3, 1),
    "four": (4, 3, 1),
    "again": (4, 4, 4),
    "eight": (8, 2, 1),
}  # bits, rank, iterations


def main() -> None:
    """Write the file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("file", help="a safetensors file to write")
    file = parser.parse_args().file
    # PEFT asks for the package before it takes its own quantiser.
    sys.modules.setdefault("bitsandbytes", types.ModuleType("bitsandbytes"))
    loftq_utils.is_bnb_available = lambda: True
    loftq_utils.is_bnb_4bit_available = lambda: False
    weight = np.random.default_rng(0).normal(0, 0.3, (24, 16)).astype(np.float32)
    found = {"weight": weight}
    for name, (bits, rank, iterations) in CASES.items():
        values, a, b = loftq_utils.loftq_init(torch.tensor(weight), bits, rank, iterations)
        # PEFT's factors have all rows and columns, zeros after the rank.
        found |= {f"{name}.values": values.numpy(), f"{name}.product": (b @ a).numpy()}
    save_file(found, file)


if __name__ == "__main__":
    main()
