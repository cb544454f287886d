"""The sparse tensors of diff pruning's files.

<tensor> is the cell's "weight" or "bias":

base_model.model.<path>.diff_<tensor>.indices   (axes, kept) int32, one row for each axis of the tensor
base_model.model.<path>.diff_<tensor>.values    (kept,) float32

and ``kept`` in the config says how many there are of each.
"""

from __future__ import annotations

from collections.abc import Collection

import numpy as np

from mindpeft.errors import InputError


def is_sparse(names: Collection[str]) -> bool:
    """Whether tensors are those of a file rather than those of training."""
    return any(name.endswith(".values") for name in names)


def check_indices(name: str, indices: np.ndarray, shape: tuple[int, ...]) -> None:
    """Raise ``InputError`` unless ``indices`` (axes, kept) are different places in a tensor of ``shape``."""
    if indices.dtype.kind not in "iu":
        raise InputError(f"{name!r} must hold whole numbers, not {indices.dtype}")
    for axis, (row, length) in enumerate(zip(indices, shape, strict=True)):
        outside = row[(row < 0) | (row >= length)]
        if outside.size:
            raise InputError(
                f"{name!r} has the index {outside[0]} for axis {axis}, which must lie in [0, {length})"
            )
    flat = np.ravel_multi_index(tuple(indices.astype(np.int64)), shape)
    places, counts = np.unique(flat, return_counts=True)
    if (counts > 1).any():
        twice = tuple(map(int, np.unravel_index(places[counts.argmax()], shape)))
        raise InputError(f"{name!r} names the place {twice} twice; each difference must have its own")
