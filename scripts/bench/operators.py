"""What single operators cost on the CPU: time of MindSpore's own and of ours, and kept memory.

    python scripts/bench/operators.py time
    python scripts/bench/operators.py memory

``time``: forward and backward at BERT-base's shapes (batch 8 x 128). ``memory``: how much a graph of 20 such
operators on 64 MB tensors takes beyond its input, each in a process of its own.
"""

from __future__ import annotations

import subprocess
import sys
import time

import mindspore as ms
import numpy as np
from mindspore import nn, ops
from sides import peak_memory_gb

from mindpeft.ops.activations import CpuGelu, Gelu
from mindpeft.ops.attention import CpuSoftmax, MergeHeads, SplitHeads
from mindpeft.ops.normalization import CpuLayerNorm, LayerNorm

CHAIN, ROUNDS = 4, 8
MEMORY_CHAIN, MEMORY_SHAPE = 20, (16384, 1024)


class SplitAndMerge(nn.Cell):
    """Into 12 heads and back, by copies."""

    def __init__(self):
        super().__init__()
        self.split, self.merge = SplitHeads(12), MergeHeads(12)

    def construct(self, x):
        return self.merge(self.split(x))


class TransposeTwice(nn.Cell):
    """The same by Transpose."""

    def construct(self, x):
        heads = ops.transpose(x.reshape((8, 128, 12, 64)), (0, 2, 1, 3))
        return ops.transpose(heads, (0, 2, 1, 3)).reshape((8, 128, 768))


class Chain(nn.Cell):
    """One cell several times, so that the call itself weighs little."""

    def __init__(self, cell: nn.Cell, length: int):
        super().__init__()
        self.cell, self.length = cell, length

    def construct(self, x, *rest):
        for _ in range(self.length):
            x = self.cell(x, *rest)
        return x


class Backward(nn.Cell):
    """Forward and backward of a chain."""

    def __init__(self, chain: Chain):
        super().__init__()
        self.chain, self.gradient = chain, ops.GradOperation(sens_param=True)

    def construct(self, x, sens, *rest):
        return self.gradient(self.chain)(x, *rest, sens)


def normal(*shape: int) -> ms.Tensor:
    return ms.Tensor(np.random.default_rng(0).standard_normal(shape), ms.float32)


def measure_times() -> None:
    """Print the best of several rounds; the rounds go through all cases in turn."""
    affine = (ops.ones(768, ms.float32), ops.zeros(768, ms.float32))
    wide, narrow, scores = normal(1024, 3072), normal(1024, 768), normal(8, 12, 128, 128)
    cases = {
        "exact GELU, own": (Gelu(), wide),
        "exact GELU, chosen": (CpuGelu(), wide),
        "LayerNorm, own": (LayerNorm(1e-12), narrow, *affine),
        "LayerNorm, chosen": (CpuLayerNorm(1e-12), narrow, *affine),
        "softmax, own": (nn.Softmax(-1), scores),
        "softmax, chosen": (CpuSoftmax(), scores),
        "heads, own": (TransposeTwice(), normal(8, 128, 768)),
        "heads, chosen": (SplitAndMerge(), normal(8, 128, 768)),
    }
    steps = {
        name: (Backward(Chain(cell, CHAIN)), x, normal(*x.shape), rest)
        for name, (cell, x, *rest) in cases.items()
    }
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(ROUNDS):
        for name, (step, x, sens, rest) in steps.items():
            began = time.perf_counter()
            step(x, sens, *rest).asnumpy()
            seconds[name].append(time.perf_counter() - began)
    for name, all_seconds in seconds.items():
        print(f"{name:24}{min(all_seconds[1:]) / CHAIN * 1e3:8.1f} ms forward and backward")


class Broadcast(nn.Cell):
    def construct(self, x, vector):
        return x + vector


class BiasAdd(nn.Cell):
    def construct(self, x, vector):
        return ops.bias_add(x, vector)


class Transpose(nn.Cell):
    def construct(self, x, vector):
        return ops.transpose(x.reshape((64, 256, 16, 64)), (0, 2, 1, 3)).reshape(x.shape)


class SplitStack(nn.Cell):
    def construct(self, x, vector):
        return ops.stack(ops.split(x.reshape((64, 256, 1024)), 64, -1), 1).reshape(x.shape)


MEMORY_CASES = {cell.__name__: cell for cell in (Broadcast, BiasAdd, Transpose, SplitStack)}


def measure_memory(name: str) -> None:
    """Print what one chain took, in tensors of its own size."""
    x, vector = normal(*MEMORY_SHAPE), ops.zeros(MEMORY_SHAPE[1], ms.float32)
    before = peak_memory_gb()
    Chain(MEMORY_CASES[name](), MEMORY_CHAIN)(x, vector).asnumpy()
    tensor = 4 * MEMORY_SHAPE[0] * MEMORY_SHAPE[1] / 1e9
    print(f"{name:12}{(peak_memory_gb() - before) / tensor:6.1f} tensors for a chain of {MEMORY_CHAIN}")


def main() -> None:
    ms.set_context(mode=ms.GRAPH_MODE)
    ms.set_device("CPU")
    match sys.argv[1:]:
        case ["time"]:
            measure_times()
        case ["memory"]:
            for name in MEMORY_CASES:
                subprocess.run([sys.executable, __file__, "memory", name], check=True)
        case ["memory", name] if name in MEMORY_CASES:
            measure_memory(name)
        case _:
            sys.exit(__doc__)


if __name__ == "__main__":
    main()
