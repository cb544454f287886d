"""The embedding table."""

from __future__ import annotations

import mindspore as ms
import mindspore.nn as nn
from mindspore import Tensor, ops

from mindpeft.nn.parameter import empty_parameter
from mindpeft.ops.embedding import Lookup


class _HoldBack(nn.Cell):
    """``rows`` unchanged, with no gradient to those of one id; nothing to pay unless ``rows`` are trained."""

    def __init__(self, held: int):
        super().__init__()
        self.held = held
        self.tile = ops.Tile()

    def construct(self, rows, ids):
        return rows

    def bprop(self, rows, ids, out, dout):
        passes = (ids != self.held).astype(dout.dtype).reshape((*ids.shape, 1))
        every_column = (*(1 for _ in ids.shape), rows.shape[-1])
        return dout * self.tile(passes, every_column), ops.zeros_like(ids)


class Embedding(nn.Cell):
    """Rows of ``weight`` (num_embeddings, embedding_dim), looked up by integer ids.

    As in PyTorch, training leaves the row ``padding_idx`` as it is.
    """

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        padding_idx: int | None = None,
        dtype: ms.Type = ms.float32,
    ):
        super().__init__()
        self.num_embeddings = num_embeddings
        self.embedding_dim = embedding_dim
        self.padding_idx = padding_idx
        self.weight = empty_parameter((num_embeddings, embedding_dim), dtype)
        self.look_up = Lookup()
        self.hold_back = None if padding_idx is None else _HoldBack(padding_idx)

    def construct(self, ids: Tensor) -> Tensor:
        rows = self.look_up(self.weight, ids)
        return rows if self.hold_back is None else self.hold_back(rows, ids)


def lookup_tables(model: nn.Cell) -> set[str]:
    """The places of a model's parameters that are read by rows alone.

    Those are the weights of its `Embedding` cells but for one that another cell has too, such as a tied
    output layer, whose product reads all of it.
    """
    tables: dict[str, int] = {}
    others: set[int] = set()
    for path, cell in model.cells_and_names():
        found = {
            name: id(parameter)
            for name, parameter in cell.parameters_and_names(name_prefix=path, expand=False)
        }
        if type(cell) is Embedding:
            tables.update(found)
        else:
            others.update(found.values())
    return {name for name, parameter in tables.items() if parameter not in others}
