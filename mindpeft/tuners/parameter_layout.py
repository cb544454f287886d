"""How LoRA's A and B of a plain parameter lie in Hugging Face PEFT's files and in a slot.

A parameter is (out, in), or (experts, out, in), or (experts, in, out) where the cell says
``is_transposed = True``. A file has, for rank r, A (r * experts, in) with the experts slowest, and
B (out, r * experts) with the experts fastest. Of several parameters of a cell the last one's tensors bear the
cell's path, and each one before it has one more ``base_layer`` in its names.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from mindspore import nn

from mindpeft.parameters import Place
from mindpeft.tuners.base import Shapes, Tensors


@dataclass(frozen=True)
class Layout:
    """How a parameter's A and B lie: in files, and in the slot, where a higher rank appends zeros.

    Attributes:
        key: the parameter's name behind the cell's path.
        attribute: the cell's attribute.
        prefix: of the names of its tensors.
        shape: the parameter's.
        transposed: whether it is (experts, in, out).
    """

    key: str
    attribute: str
    prefix: str
    shape: tuple[int, ...]
    transposed: bool

    @property
    def names(self) -> tuple[str, str]:
        """The names of A and B."""
        return f"{self.prefix}lora_A.weight", f"{self.prefix}lora_B.weight"

    @property
    def experts(self) -> int:
        """How many matrices there are."""
        return self.shape[0] if len(self.shape) == 3 else 1

    def shapes(self, rank: int) -> Shapes:
        """The shapes of A and B in a file."""
        n_out, n_in = self.shape[-2:][:: -1 if self.transposed else 1]
        rows = rank * self.experts
        return dict(zip(self.names, ((rows, n_in), (n_out, rows)), strict=True))

    def to_slot(self, name: str, value: np.ndarray) -> np.ndarray:
        """A or B of experts as (experts, r, in) or (experts, out, r); of a single matrix as it is."""
        if len(self.shape) == 2:
            return value
        if name == self.names[0]:
            return value.reshape(self.experts, -1, value.shape[1])
        return value.reshape(value.shape[0], -1, self.experts).transpose(2, 0, 1)

    def to_file(self, name: str, value: np.ndarray) -> np.ndarray:
        """The reverse of ``to_slot``."""
        if len(self.shape) == 2:
            return value
        if name == self.names[0]:
            return value.reshape(-1, value.shape[2])
        return np.ascontiguousarray(value.transpose(1, 2, 0)).reshape(value.shape[1], -1)

    def product(self, tensors: Tensors) -> np.ndarray:
        """B A in the parameter's shape, in float32."""
        a, b = (self.to_slot(name, tensors[name].astype(np.float32)) for name in self.names)
        product = b @ a
        return product.swapaxes(1, 2) if self.transposed else product


def layouts_of(cell: nn.Cell, parameters: tuple[tuple[str, str], ...]) -> list[Layout]:
    """The layouts of some of a cell's parameters, (key, attribute) in the order of the cell."""
    found = []
    for index, (key, attribute) in enumerate(parameters):
        shape = tuple(Place(cell, attribute).parameter.shape)
        transposed = len(shape) == 3 and bool(getattr(cell, "is_transposed", False))
        found.append(Layout(key, attribute, "base_layer." * (len(parameters) - 1 - index), shape, transposed))
    return found
