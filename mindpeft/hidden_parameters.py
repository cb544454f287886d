"""Parameters that graphs have and models have not: numbers by which otherwise equal layers differ.

What a graph reads from a layer's attributes is a constant of it, so layers that differ in one cannot share a
graph (`mindpeft.shared_layers`). In a parameter they may differ. A parameter of the model would be counted,
saved and looked for in checkpoints, though; these are parameters of their Cells only while a graph is made.
"""

from __future__ import annotations

from mindspore import Parameter, Tensor, nn


def hide(cell: nn.Cell, name: str, value: Tensor, known_as: str) -> None:
    """Give a Cell a hidden parameter.

    Args:
        cell: its class has the name in ``HIDDEN``.
        name: of the attribute.
        value: the numbers.
        known_as: the parameter's name in graphs, where it has to be the only one of that name.
    """
    vars(cell)[name] = Parameter(value, name=known_as, requires_grad=False)


class HiddenParameters:
    """Inside a ``with`` block they are parameters of the Cells that `show` has been given."""

    def __init__(self) -> None:
        self._shown: list[tuple[nn.Cell, str]] = []

    def __enter__(self) -> HiddenParameters:
        return self

    def __exit__(self, *_: object) -> None:
        for cell, name in self._shown:
            cell._params.pop(name, None)

    def show(self, model: nn.Cell) -> None:
        """Let the graph that is made of a model have what its Cells hide."""
        for _, cell in model.cells_and_names():
            for name in getattr(cell, "HIDDEN", ()):
                if name in vars(cell):
                    cell._params[name] = vars(cell)[name]
                    self._shown.append((cell, name))
