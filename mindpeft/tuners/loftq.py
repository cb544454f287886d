"""LoftQ: the base weight is quantised, and LoRA begins with what that lost.

Li et al. 2023, "LoftQ: LoRA-Fine-Tuning-Aware Quantization for Large Language Models". With A and B zero at
first, T times in turn: Q = quantised(W - B A), and B A = the best product of rank r for W - Q. The cell then
works with the values of Q, in the dtype that its weight has: no quantised kernel is needed, and no memory
saved. As in Hugging Face PEFT the product is corrected for a scaling of 1.

2 and 4 bits are blocks of 64 weights, each with its largest magnitude and the quantiles of a normal
distribution as levels (NF4 of Dettmers et al. 2023, "QLoRA: Efficient Finetuning of Quantized LLMs"). 8 bits
are whole numbers with the largest magnitude of each row, over weights rounded to half precision, as by the
bitsandbytes that PEFT uses since 0.19; before that they were blocks as well.
"""

from __future__ import annotations

import re
from statistics import NormalDist

import numpy as np

from mindpeft.errors import InputError

_BLOCK = 64
_OUTERMOST = 0.9677083  # the quantile of the outermost level; NF4's


def levels(bits: int) -> np.ndarray:
    """The 2^bits levels of a block, rising from -1 to 1, zero among them, float32."""
    half, quantile = 2 ** (bits - 1), NormalDist().inv_cdf
    positive = [quantile(chance) for chance in np.linspace(_OUTERMOST, 0.5, half + 1)[:-1]]
    negative = [-quantile(chance) for chance in np.linspace(_OUTERMOST, 0.5, half)[:-1]]
    values = np.sort(np.array([*positive, 0.0, *negative]))
    return (values / values.max()).astype(np.float32)


def quantised(weight: np.ndarray, bits: int, rows: bool) -> np.ndarray:
    """A weight's values after quantisation, float32.

    Args:
        weight: (out, in) float32.
        bits: 2, 4 or 8.
        rows: 8 bits with a scale for each row.
    """
    return _by_rows(weight) if rows and bits == 8 else _by_blocks(weight, bits)


def _by_rows(weight: np.ndarray) -> np.ndarray:
    half = weight.astype(np.float16).astype(np.float32)
    largest = np.abs(half).max(1, keepdims=True)
    codes = np.rint(half * (np.float32(127) / np.where(largest > 0, largest, 1)))
    return (codes * largest * np.float32(1 / 127)).astype(np.float32)


def _by_blocks(weight: np.ndarray, bits: int) -> np.ndarray:
    blocks = np.pad(weight.reshape(-1), (0, -weight.size % _BLOCK)).reshape(-1, _BLOCK)
    largest = np.abs(blocks).max(1, keepdims=True)
    table = levels(bits)
    between = (table[1:] + table[:-1]) / 2
    nearest = np.searchsorted(between, blocks / np.where(largest > 0, largest, 1))
    return (table[nearest] * largest).reshape(-1)[: weight.size].reshape(weight.shape)


def loftq(
    weight: np.ndarray, rank: int, bits: int, iterations: int, rows: bool
) -> tuple[np.ndarray, tuple[np.ndarray, np.ndarray]]:
    """The quantised weight's values, (out, in), and A (rank, in) and B (out, rank).

    Args:
        weight: (out, in) float32.
        rank: at most the smaller side of the weight.
        bits, rows: as for ``quantised``.
        iterations: T.

    Raises:
        InputError: the rank is too large.
    """
    if rank > min(weight.shape):
        raise InputError(
            f'init_lora_weights="loftq" needs a rank of at most {min(weight.shape)} '
            f"for a weight of shape {weight.shape}, not {rank}"
        )
    rest = weight
    for _ in range(iterations):
        values = quantised(rest, bits, rows)
        u, sizes, v = np.linalg.svd(weight - values, full_matrices=False)
        roots = np.sqrt(sizes[:rank])
        a, b = roots[:, None] * v[:rank], u[:, :rank] * roots
        rest = weight - b @ a
    return values, (a, b)


def has_rows(peft_version: str | None) -> bool:
    """Whether 8 bits have a scale for each row in that version of PEFT."""
    return re.match(r"0\.(\d|1[0-8])\b", str(peft_version)) is None
