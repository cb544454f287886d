"""A bare model's parameters by their Hugging Face names, and writing values into them."""

from __future__ import annotations

from dataclasses import dataclass

import mindspore as ms
import numpy as np
from mindspore import nn

from mindpeft.ops.device import synchronize

# MindSpore's classic cells name parameters differently from torch.
CLASSIC_NAMES = {
    "gamma": "weight",
    "beta": "bias",
    "embedding_table": "weight",
    "moving_mean": "running_mean",
    "moving_variance": "running_var",
}
# What normalisation over batches keeps count of, in MindSpore's classic cells and in those of ``mint``.
_STATISTICS = frozenset(
    {"moving_mean", "moving_variance", "running_mean", "running_var", "num_batches_tracked"}
)


def assign(parameter: ms.Parameter, value: np.ndarray) -> None:
    """Write a value over a parameter's, rounded to its dtype.

    In place: a compiled ``mindspore.jit`` function never sees what ``set_data`` puts there.
    """
    # Not `ops.assign`, which takes no bfloat16 on the CPU.
    parameter.copy_(ms.Tensor(value).astype(parameter.dtype))
    synchronize()  # or tensors wait in line for their copy, each in memory


@dataclass(frozen=True)
class Place:
    """Where a parameter of the base model lives: MindSpore may replace the object, never its place."""

    cell: nn.Cell
    attribute: str

    @property
    def parameter(self) -> ms.Parameter:
        """The parameter that is there now."""
        # Not the attribute at once: it is another value where LoRA adapts the parameter itself.
        own = self.cell._params.get(self.attribute)
        return getattr(self.cell, self.attribute) if own is None else own

    @property
    def is_statistic(self) -> bool:
        """Whether this is a running statistic, which no gradient reaches."""
        return self.attribute in _STATISTICS

    def read(self) -> np.ndarray:
        """A copy of the value on the host."""
        return self.parameter.asnumpy().copy()

    def write(self, value: np.ndarray) -> None:
        """Set the value, which is rounded to the parameter's dtype."""
        assign(self.parameter, value)

    def put(self, parameter: ms.Parameter) -> ms.Parameter:
        """Put another parameter here; returns the one that was. Graphs compiled before are stale then."""
        earlier = self.parameter
        setattr(self.cell, self.attribute, parameter)
        return earlier


def base_places(model: nn.Cell) -> dict[str, Place]:
    """Every parameter of a bare model by its Hugging Face name; a tied one occurs under each of its names."""
    places = {}
    for path, cell in model.cells_and_names():
        for name, _ in cell.parameters_and_names(expand=False):
            attribute = name.rsplit(".", 1)[-1]
            leaf = CLASSIC_NAMES.get(attribute, attribute)
            if hasattr(cell, leaf):  # a cell that has both names means them
                leaf = attribute
            places[f"{path}.{leaf}" if path else leaf] = Place(cell, attribute)
    return places
