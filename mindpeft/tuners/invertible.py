"""Invertible adapters behind the embeddings: the part of a language adapter that belongs to the vocabulary.

Pfeiffer et al. 2020, "MAD-X: An Adapter-Based Framework for Multi-Task Cross-Lingual Transfer", after Dinh et
al. 2015, "NICE: Non-linear Independent Components Estimation": y1 = x1 + F(x2), y2 = x2 + G(y1), x1 and x2
being the halves of the features. As in AdapterHub's library for a model with its own head, the inverse is not
applied before the vocabulary of a language model.
"""

from __future__ import annotations

from typing import Any

import mindspore as ms
import numpy as np
from mindspore import nn, ops

from mindpeft.errors import InputError
from mindpeft.ops.linear import linear
from mindpeft.tuners.base import Shapes, Site, Tensors, TunerLayer, original, weight_attribute
from mindpeft.tuners.bottleneck_layers import NON_LINEARITIES, Layout

_CHILDREN = {"word_embeddings", "LayerNorm", "dropout"}


def is_embeddings(cell: nn.Cell) -> bool:
    """Whether a cell sums up embeddings, as BERT's does."""
    return cell.name_cells().keys() >= _CHILDREN


def embedding_size(cell: nn.Cell) -> int:
    """The number of features that such a cell gives."""
    words = original(cell.word_embeddings)
    return getattr(words, weight_attribute(words)).shape[1]


class InvertibleLayer(TunerLayer):
    """An invertible adapter around the embeddings.

    Of several active adapters, the first one's acts, as in the library. (If the first one has none, the
    library takes none; here it is the first that there is.)
    """

    LAYOUT: Layout

    def __init__(self, base_layer: nn.Cell, *slot: Any) -> None:
        super().__init__(base_layer, *slot)
        self.is_first = not isinstance(base_layer, InvertibleLayer)
        self.activation = NON_LINEARITIES[self.LAYOUT.non_linearity]()

    @classmethod
    def tensor_shapes(cls, site: Site) -> Shapes:
        size = embedding_size(site.cell)
        shapes: Shapes = {}
        for name, n_in, n_out in (("F", size - size // 2, size // 2), ("G", size // 2, size - size // 2)):
            width = int(n_in // site.config.inv_adapter_reduction_factor)
            if width < 1:
                raise InputError(
                    f"inv_adapter_reduction_factor {site.config.inv_adapter_reduction_factor} leaves nothing "
                    f"of the {n_in} features that an invertible adapter reads"
                )
            shapes |= {f"{name}.first.weight": (width, n_in), f"{name}.first.bias": (width,)}
            shapes |= {f"{name}.last.weight": (n_out, width), f"{name}.last.bias": (n_out,)}
        return shapes

    @classmethod
    def initial_tensors(cls, site: Site) -> Tensors:
        return {
            name: (np.random.normal(0.0, 0.02, shape) if name.endswith("weight") else np.zeros(shape)).astype(
                np.float32
            )
            for name, shape in cls.tensor_shapes(site).items()
        }

    @classmethod
    def holds(cls, room: Shapes, shapes: Shapes) -> bool:
        return room == shapes

    def construct(self, *inputs: Any) -> ms.Tensor:
        return self.embedded(*inputs)[0]

    def embedded(self, *inputs: Any) -> tuple[ms.Tensor, ms.Tensor]:
        """The embeddings, and a number that is not 0 once an adapter has acted on them."""
        if self.is_first:
            plain = self.base_layer(*inputs)
            adapted = self.unless_off(self.coupled(plain), plain)
            return adapted, self.scaling
        plain, acted = self.base_layer.embedded(*inputs)
        adapted = ops.select(ops.equal(acted, 0.0), self.unless_off(self.coupled(plain), plain), plain)
        return adapted, acted + self.scaling

    def coupled(self, x: ms.Tensor) -> ms.Tensor:
        """Both halves of the features, each moved by a function of the other."""
        half = x.shape[-1] // 2
        wide = ops.cast(x, self.slot_dtype)
        second = wide[..., half:]
        first = wide[..., :half] + self.network(self.F, second)
        second = second + self.network(self.G, first)
        return ops.cast(ops.concat((first, second), -1), x.dtype)

    def network(self, half: nn.Cell, x: ms.Tensor) -> ms.Tensor:
        """One of the two networks."""
        inner = self.activation(linear(x, half.first.weight, half.first.bias))
        return linear(inner, half.last.weight, half.last.bias)
