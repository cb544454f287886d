"""What a LoRA step of a BERT must cost at least: its products, its memory, and what this machine can do."""

from __future__ import annotations

import os
import platform
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from sides import Side, alternate, serve

WIDTH, HEADS, INNER, POSITIONS, VOCABULARY, LABELS = 384, 12, 1536, 1024, 30522, 2
FLOAT = 4  # bytes
# A product as large as a layer of a big model, and more numbers than any cache holds.
PRODUCT_ROWS, PRODUCT_DEPTH = 2048, 8192
COPIED = 1 << 26
ROUNDS = 10


class Point(NamedTuple):
    """What is trained: texts in a batch, tokens of each, LoRA's rank (on query and value), layers."""

    rows: int = 8
    length: int = 128
    rank: int = 8
    layers: int = 6


def step_products(point: Point) -> int:
    """The floating-point operations of a step's matrix products, two for each multiplication and addition.

    The frozen weights take part twice, forward and in the gradient of their inputs; LoRA's and the
    classifier's three times; attention's two products have four for their gradients.
    """
    tokens = point.rows * point.length
    frozen = 2 * tokens * (4 * WIDTH**2 + 2 * WIDTH * INNER)
    down = 2 * 2 * tokens * WIDTH * point.rank  # LoRA's A of query and value; B costs as much
    scores = 2 * tokens * point.length * WIDTH  # query times key; weights times value cost as much
    layer = 2 * frozen + 3 * 2 * down + 3 * 2 * scores
    # Nothing before the first layer is trained: no gradient of its input, so none of its keys either.
    not_in_first = 2 * tokens * 3 * WIDTH**2 + down + scores
    head = 2 * point.rows * WIDTH * (2 * WIDTH + 3 * LABELS)
    return point.layers * layer - not_in_first + head


def layer_weights() -> int:
    """How many numbers a layer has without LoRA."""
    attention = 4 * (WIDTH**2 + WIDTH)
    feed_forward = 2 * WIDTH * INNER + INNER + WIDTH
    return attention + feed_forward + 2 * 2 * WIDTH


def frozen_weights(point: Point) -> int:
    """How many numbers stay as they are: embeddings, layers, pooler."""
    embeddings = (VOCABULARY + POSITIONS + 2 + 2) * WIDTH
    return embeddings + point.layers * layer_weights() + WIDTH**2 + WIDTH


def trained_weights(point: Point) -> int:
    """How many numbers are trained: LoRA's A and B on query and value, the classifier."""
    return point.layers * 2 * 2 * WIDTH * point.rank + (WIDTH + 1) * LABELS


def kept_numbers(point: Point) -> int:
    """How many numbers of the forward pass the backward pass can't do without, unless it computes them again.

    For each token and layer: the layer's input, query, key, value, what attention gives, the normalised sum
    behind it (six of the width; the normalised sum at the end is the next layer's input), what goes into
    GELU, LoRA's products with A, a logarithm for each head.
    """
    of_token = 6 * WIDTH + INNER + 2 * point.rank + HEADS
    return point.layers * point.rows * point.length * of_token


def least_memory(point: Point) -> int:
    """Bytes: weights, for the trained ones a gradient and AdamW's two moments besides, what is kept."""
    return FLOAT * (frozen_weights(point) + 4 * trained_weights(point) + kept_numbers(point))


def least_traffic(point: Point) -> int:
    """Bytes: the layers' weights read forward and backward, what is kept written and read."""
    return FLOAT * 2 * (point.layers * layer_weights() + kept_numbers(point))


def _our_product() -> Callable[[], float]:
    import mindspore as ms

    from mindpeft.device import setup_device
    from mindpeft.ops.linear import Product

    setup_device("CPU")
    factor = ms.Tensor(np.ones((PRODUCT_ROWS, PRODUCT_DEPTH), np.float32))
    product = Product()
    return lambda: float(product(factor, factor).asnumpy()[0, 0])


def _torch_product() -> Callable[[], float]:
    import torch

    factor = torch.ones(PRODUCT_ROWS, PRODUCT_DEPTH)
    return lambda: torch.nn.functional.linear(factor, factor)[0, 0].item()


def _copy() -> Callable[[], float]:
    import torch

    source, target = torch.ones(COPIED), torch.zeros(COPIED)
    return lambda: target.copy_(source)[0].item()


SPEEDS = {"our-product": _our_product, "torch-product": _torch_product, "copy": _copy}


def serve_speed(name: str) -> None:
    """Run the side that measures one of ``SPEEDS``."""
    serve(SPEEDS[name])


def machine(script: str, threads: int) -> dict[str, Any]:
    """Measure GFLOP/s of a large product in both packages and GB/s of a copy, medians of some rounds.

    Args:
        script: it runs ``serve_speed`` when called with ``--side`` and a name of ``SPEEDS``.
        threads: of each side.
    """
    ours, peer = alternate(
        [script, "--side", "our-product"], [script, "--side", "torch-product"], ROUNDS, threads
    )
    copying = Side([script, "--side", "copy"], threads)
    for _ in range(ROUNDS):
        copying.step()
    operations = 2 * PRODUCT_ROWS**2 * PRODUCT_DEPTH
    return {
        "name": machine_name(),
        "threads": threads,
        "our_gflops": operations / seconds(ours, threads) / 1e9,
        "torch_gflops": operations / seconds(peer, threads) / 1e9,
        "gbytes": 2 * FLOAT * COPIED / seconds(copying.close(), threads) / 1e9,
    }


def seconds(side: dict[str, float], threads: int) -> float:
    """A step's processor time for each thread: what the clock would show where nobody else works.

    The clock itself tells little on a machine that others share. Where one thread waits for the other, a
    step takes longer than this.
    """
    return side["cpu"] / threads


def speed(measured: dict[str, Any]) -> float:
    """Floating-point operations a second of the faster of the two products that ``machine`` measured."""
    return 1e9 * max(measured["our_gflops"], measured["torch_gflops"])


def machine_name() -> str:
    """The kind of processor and the number of cores."""
    kind = platform.machine().replace("_", "-")
    flags = Path("/proc/cpuinfo").read_text(encoding="utf-8").split()
    level = next((name for flag, name in (("avx512f", "AVX-512"), ("avx2", "AVX2")) if flag in flags), None)
    return f"{kind}{f' with {level}' if level else ''}, {os.cpu_count()} cores"
