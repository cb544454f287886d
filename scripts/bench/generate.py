"""Generation in mindpeft and in transformers: prefill seconds, tokens a second, peak memory, ratios.

    python scripts/bench/generate.py                     # Qwen2.5-0.5B's shape, batches of 1 and 8
    python scripts/bench/generate.py --rows 1 --dtype bfloat16 --steps 3

Random weights, prompts of 128 tokens, 64 new ones, greedy. Each side runs in its own process and the
two take turns. A turn writes one token, then 64: the difference is the time of 63 decoding steps. Needs the
test extra.
"""

from __future__ import annotations

import argparse
import itertools
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from sides import alternate, serve
from train_step import QWEN

PROMPT, NEW = 128, 64
DTYPES = ["float32", "bfloat16"]


def prompts(rows: int) -> np.ndarray:
    """The tokens that both sides go on from."""
    return np.random.default_rng(0).integers(1000, 30000, (rows, PROMPT))


def torch_write(folder: str, rows: int, dtype: str) -> Callable[[int], np.ndarray]:
    """transformers' generation."""
    import torch
    import transformers

    torch.set_num_threads(2)
    weights = getattr(torch, dtype)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=weights).eval()
    ids = torch.tensor(prompts(rows))
    options = {"do_sample": False, "pad_token_id": 0, "eos_token_id": None}

    def write(count: int) -> np.ndarray:
        with torch.no_grad():
            found = model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=count,
                min_new_tokens=count,
                **options,
            )
        return found.numpy()

    return write


def mindpeft_write(folder: str, rows: int, dtype: str) -> Callable[[int], np.ndarray]:
    """Ours."""
    from mindpeft.device import setup_device
    from mindpeft.models import AutoModelForCausalLM

    setup_device("CPU")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    ids = prompts(rows)
    model.generate(ids, max_new_tokens=NEW, eos_token_id=None)  # both graphs, with room for all

    def write(count: int) -> np.ndarray:
        return model.generate(ids, max_new_tokens=count, eos_token_id=None).asnumpy()

    return write


def turn(write: Callable[[int], np.ndarray]) -> Callable[[], float]:
    """One token, then all; "loss" carries the seconds of the first."""

    def step() -> float:
        began = time.perf_counter()
        write(1)
        prefill = time.perf_counter() - began
        write(NEW)
        return prefill

    return step


def compare(rows: int, dtype: str, steps: int, folder: str) -> None:
    """Print the figures of one batch size and one precision of the weights."""
    common = ["--rows", str(rows), "--dtype", dtype, "--folder", folder]
    ours, peer = alternate(
        [__file__, "--side", "mindpeft", *common], [__file__, "--side", "torch", *common], steps, 2
    )
    print(f"\nQwen2.5-0.5B's shape, batch {rows}, prompt {PROMPT}, {NEW} new tokens, {dtype}, {steps} turns")
    print(f"{'':24}{'mindpeft':>12}{'transformers':>14}{'ratio':>8}")
    figures = []
    for side in (ours, peer):
        prefill = side["last_loss"]
        figures.append((prefill, rows * (NEW - 1) / (side["step"] - 2 * prefill), side["memory"]))
    names = ("prefill, s", "decoding, tokens/s", "peak memory, GB")
    for name, mine, other in zip(names, *figures, strict=True):
        print(f"{name:24}{mine:12.3f}{other:14.3f}{mine / other:8.2f}")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--dtype", nargs="+", default=DTYPES, choices=DTYPES)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--side", choices=["mindpeft", "torch"], help=argparse.SUPPRESS)
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.side:
        make = {"mindpeft": mindpeft_write, "torch": torch_write}[arguments.side]
        serve(lambda: turn(make(arguments.folder, arguments.rows[0], arguments.dtype[0])))
        return
    import transformers

    with tempfile.TemporaryDirectory() as scratch:
        model = transformers.AutoModelForCausalLM.from_config(transformers.Qwen2Config(**QWEN))
        model.save_pretrained(Path(scratch) / "model")
        del model
        for dtype, rows in itertools.product(arguments.dtype, arguments.rows):
            compare(rows, dtype, arguments.steps, str(Path(scratch) / "model"))


if __name__ == "__main__":
    main()
