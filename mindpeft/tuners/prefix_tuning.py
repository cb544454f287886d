"""Prefix tuning: T trained keys and values in front of those of every layer's attention.

Li and Liang 2021, "Prefix-Tuning: Optimizing Continuous Prompts for Generation". What is called P-tuning v2
(Liu et al. 2022) is this method on models with a classification head, such as token classifiers.

Real tokens stand at the positions T, T + 1, ...; the attention mask lets all of them see the prefix; labels
and outputs are as without it. With ``prefix_projection`` an MLP makes keys and values from T embeddings while
training; a file holds its output alone, from which training may go on without the MLP.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import mindspore as ms
import numpy as np
from mindspore import nn, ops

from mindpeft.config import PeftType, register_method
from mindpeft.errors import InputError
from mindpeft.hidden_parameters import hide
from mindpeft.ops.activations import tanh
from mindpeft.ops.attention import Attention, with_past
from mindpeft.ops.linear import linear
from mindpeft.tuners.base import Shapes, SharedSlot, Site, Slot, Tensors, TunerLayer
from mindpeft.tuners.prompt_layers import ModelLayer, check_room
from mindpeft.tuners.prompt_learning import (
    EMBEDDING,
    OUTPUT,
    PromptLearningConfig,
    check_arguments,
    encoder_tensors,
)
from mindpeft.tuners.targeted import check_choice, check_count

if TYPE_CHECKING:
    from mindpeft.tuners.plan import BaseModel

# The layers of the MLP.
_FIRST = "prompt_encoder.first"
_LAST = "prompt_encoder.layers"


@register_method
@dataclass
class PrefixTuningConfig(PromptLearningConfig):
    """Hugging Face PEFT's configuration of prefix tuning, key by key; see also ``PromptLearningConfig``.

    With grouped key/value heads ``token_dim`` is the width of the keys and ``num_attention_heads`` their
    number, as in PEFT.

    Attributes:
        init_weights: "zero" starts from keys and values of zeros, ``None`` from random ones.
        encoder_hidden_size: the MLP's inner width; ``token_dim`` if ``None``.
        prefix_projection: train an MLP that makes the keys and values.

    Raises:
        InputError: a value is not allowed.
    """

    init_weights: str | None = None
    encoder_hidden_size: int | None = None
    prefix_projection: bool = False

    METHOD: ClassVar[PeftType] = PeftType.PREFIX_TUNING

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("init_weights", self.init_weights, (None, "zero"))
        if self.encoder_hidden_size is not None:
            check_count("encoder_hidden_size", self.encoder_hidden_size)
        check_choice("prefix_projection", self.prefix_projection, (False, True))

    def model_sizes(self, base: BaseModel) -> dict[str, int | None]:
        sizes = super().model_sizes(base)
        config = getattr(base.model, "config", None)
        heads = getattr(config, "num_key_value_heads", None)
        if heads:
            size = getattr(config, "head_dim", None) or sizes["token_dim"] // sizes["num_attention_heads"]
            sizes |= {"token_dim": heads * size, "num_attention_heads": heads}
        return sizes

    def resolve(self, base: BaseModel) -> None:
        super().resolve(base)
        self.encoder_hidden_size = self.encoder_hidden_size or self.token_dim

    def slot_classes(self, base: BaseModel) -> dict[str, type[Slot]]:
        check_arguments(base.model, self.peft_type.value, "input_ids", "position_ids")
        paths = [path for path, cell in base.cells.items() if isinstance(cell, Attention)]
        if len(paths) != self.num_layers:
            raise InputError(
                f"PREFIX_TUNING needs a model with one mindpeft.ops.attention.Attention in each of its "
                f"{self.num_layers} layers; {type(base.model).__name__} has {len(paths)}"
            )
        return {"": PrefixEncoder, **dict.fromkeys(paths, PrefixAttention)}


class PrefixEncoder(ModelLayer, SharedSlot):
    """Keeps the keys and values of all layers, and moves the real tokens' positions behind them."""

    def __init__(self, base_layer: nn.Cell, *slot: Any) -> None:
        self.encodes = False
        super().__init__(base_layer, *slot)
        self.ids_place = self.argument_names.index("input_ids")
        self.positions_place = self.argument_names.index("position_ids")
        self.embeds_place = -1
        if "inputs_embeds" in self.argument_names:
            self.embeds_place = self.argument_names.index("inputs_embeds")
        self.layers = 0  # attention cells around which a layer was put, each with its number
        self.tanh, self.gather = tanh(), ops.Gather()

    @classmethod
    def tensor_shapes(cls, site: Site) -> Shapes:
        config = site.config
        count, width, inner = config.num_virtual_tokens, config.token_dim, config.encoder_hidden_size
        if not config.prefix_projection:
            return cls.file_shapes(site)
        shapes = {EMBEDDING: (count, width), f"{_FIRST}.weight": (inner, width), f"{_FIRST}.bias": (inner,)}
        # PEFT has one tensor for all layers here; their gradients would each have its size.
        for layer in range(config.num_layers):
            shapes |= {f"{_LAST}.{layer}.weight": (2 * width, inner), f"{_LAST}.{layer}.bias": (2 * width,)}
        return shapes

    @classmethod
    def file_shapes(cls, site: Site) -> Shapes:
        config = site.config
        return {OUTPUT: (config.num_virtual_tokens, config.num_layers * 2 * config.token_dim)}

    @classmethod
    def initial_tensors(cls, site: Site) -> Tensors:
        tensors = encoder_tensors(cls.tensor_shapes(site))
        if site.config.init_weights == "zero":
            last = [name for name in tensors if name == OUTPUT or name.startswith(_LAST)]
            tensors |= {name: np.zeros_like(tensors[name]) for name in last}
        return tensors

    @classmethod
    def to_file(cls, site: Site, tensors: Tensors) -> Tensors:
        if OUTPUT in tensors:
            return tensors
        hidden = np.tanh(tensors[EMBEDDING] @ tensors[f"{_FIRST}.weight"].T + tensors[f"{_FIRST}.bias"])
        layers = [f"{_LAST}.{layer}" for layer in range(site.config.num_layers)]
        rows = [hidden @ tensors[f"{name}.weight"].T + tensors[f"{name}.bias"] for name in layers]
        return {OUTPUT: np.concatenate(rows, 1)}

    def reserve(self, shapes: Shapes) -> bool:
        changed = super().reserve(shapes)
        self.encodes = OUTPUT not in self.slot_shapes
        return changed

    def rows(self, layer: ms.Tensor, name: str) -> ms.Tensor:
        """A layer's keys, then its values, (T, 2 * width); runs inside a graph.

        Args:
            layer: its number, (1,).
            name: the same as text.
        """
        if self.encodes:
            encoder = self.prompt_encoder
            last = getattr(encoder.layers, name)
            # Written here for each layer, but the graph computes it once.
            hidden = self.tanh(linear(encoder.embedding.weight, encoder.first.weight, encoder.first.bias))
            return linear(hidden, last.weight, last.bias)
        count, width = self.prompt_embeddings.shape
        states = ops.reshape(self.prompt_embeddings, (count, self.layers, width // self.layers))
        return ops.reshape(self.gather(states, layer, 1), (count, width // self.layers))

    def tokens(self) -> int:
        """T."""
        first = self.prompt_encoder.embedding.weight if self.encodes else self.prompt_embeddings
        return first.shape[0]

    def construct(self, *args: Any, **kwargs: Any) -> Any:
        arguments = self.arranged(args, kwargs)
        if not self.active:
            return self.base_layer(*arguments)
        ids = arguments[self.ids_place]
        batch, length = ids.shape if ids is not None else arguments[self.embeds_place].shape[:2]
        count = check_room(length, self.tokens(), self.most)
        positions = arguments[self.positions_place]
        if positions is None:
            positions = ops.tile(ops.arange(length).astype(ms.int32).reshape((1, length)), (batch, 1))
        moved = ()
        for i in range(len(arguments)):
            moved = (*moved, positions + count) if i == self.positions_place else (*moved, arguments[i])
        return self.base_layer(*moved)


class PrefixAttention(TunerLayer):
    """Puts one layer's prefix in front of the keys and values of its attention."""

    GATED: ClassVar[bool] = False  # whether it takes gates together with the mask
    HIDDEN: ClassVar[tuple[str, ...]] = ("layer",)

    @property
    def NOT_IN_GRAPH(self) -> tuple[str, ...]:
        """An MLP's last layers are looked up by their names."""
        names = super().NOT_IN_GRAPH
        return names if self.shared.encodes else (*names, "layer_name")

    def __init__(
        self,
        base_layer: nn.Cell,
        path: str,
        shapes: Shapes,
        dtype: ms.dtype,
        number: int = 0,
        shared: PrefixEncoder | None = None,
    ) -> None:
        if isinstance(base_layer, PrefixAttention) and (self.GATED or base_layer.GATED):
            raise InputError(f"no prefix can go beside one with gates, but {path!r} has one already")
        super().__init__(base_layer, path, shapes, dtype, number)
        # No child: it stands around the model that holds this layer.
        object.__setattr__(self, "shared", shared)
        self.layer_name = str(shared.layers)
        hide(self, "layer", ms.Tensor([shared.layers], ms.int32), f"{path}.{number}.layer")
        shared.layers += 1
        self.tile = ops.Tile()

    @classmethod
    def tensor_shapes(cls, site: Site) -> Shapes:
        return {}

    @classmethod
    def initial_tensors(cls, site: Site) -> Tensors:
        return {}

    def construct(
        self, query: ms.Tensor, key: ms.Tensor, value: ms.Tensor, mask: ms.Tensor | None = None
    ) -> ms.Tensor:
        if not self.shared.active:
            return self.base_layer(query, key, value, mask)
        keys, values = self.prefixes(key)
        return self.attended(query, key, value, mask, keys, values)

    def prefixes(self, key: ms.Tensor) -> tuple[ms.Tensor, ms.Tensor]:
        """The prefix's keys and values for every row and head of the real tokens' keys."""
        rows = self.shared.rows(self.layer, self.layer_name)
        count, size = rows.shape[0], key.shape[-1]
        states = ops.transpose(ops.reshape(rows, (count, -1, size)), (1, 0, 2))
        heads = states.shape[0] // 2
        return self.spread(states[:heads], key), self.spread(states[heads:], key)

    def attended(
        self,
        query: ms.Tensor,
        key: ms.Tensor,
        value: ms.Tensor,
        mask: ms.Tensor | None,
        keys: ms.Tensor,
        values: ms.Tensor,
    ) -> ms.Tensor:
        """What attention gives with a prefix in front; the mask lets all tokens see it."""
        key, value = ops.concat((keys, key), 2), ops.concat((values, value), 2)
        if mask is not None:
            mask = with_past(mask, keys.shape[2])
        return self.base_layer(query, key, value, mask)

    def spread(self, prefix: ms.Tensor, states: ms.Tensor) -> ms.Tensor:
        """A prefix, (heads, T, size), for every row and head of some states, (batch, heads, length, size)."""
        heads, count, size = prefix.shape
        # Where a model has repeated grouped key/value heads by now, so is the prefix.
        repeats = states.shape[1] // heads
        prefix = ops.reshape(ops.cast(prefix, states.dtype), (1, heads, 1, count, size))
        prefix = self.tile(prefix, (states.shape[0], 1, repeats, 1, 1))
        return ops.reshape(prefix, (states.shape[0], heads * repeats, count, size))
