"""The layers of decoders, in the shape that Llama made common; models differ in the flags of a `DecoderSpec`.

The names of the cells are those of Hugging Face's Llama; a model that names or joins them otherwise replaces
one of these cells by its own.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import mindspore.nn as nn
from mindspore import Tensor, ops

from mindpeft.nn.cache import LayerCache
from mindpeft.nn.checkpointing import CheckpointingStack
from mindpeft.nn.linear import Linear
from mindpeft.nn.normalization import LayerNorm, RMSNorm, norm_and_sum
from mindpeft.nn.rotary import RotarySpec, RotaryTables
from mindpeft.ops.activations import Gate
from mindpeft.ops.attention import Attention, SplitHeads
from mindpeft.ops.causal_mask import CausalMask
from mindpeft.ops.rotary import SplitAndRotate


@dataclass(frozen=True)
class DecoderSpec:
    """The flags of a decoder.

    Attributes:
        layers: how many.
        width: of the hidden states.
        heads, key_heads: of the queries, and of the keys and values.
        head_size: columns of a head.
        inner_width: of the feed-forward half.
        activation: its function, by Hugging Face's name.
        layer_norm: the norms are LayerNorms with a bias; else RMSNorms.
        norm_affine: whether the LayerNorms have a weight and a bias.
        final_norm: whether there is a norm behind the last layer.
        norm_eps: of the norms.
        norm_offset: what a norm's weight of zero stands for.
        qkv_bias, output_bias, mlp_bias: whether the projections have one.
        norm_behind: whether a layer's norms stand behind its halves instead of before them.
        norm_in_residual: whether a layer's halves are added to what their norms give.
        parallel: whether attention and feed-forward both work on what comes into a layer.
        query_key_norm: whether every head's queries and keys are normalised.
        windows: the kinds of attention in use: how many tokens one sees, None for all before it.
        window_of: for each layer, which of them.
        rotary: the kinds of rotary embedding in use; none where positions are told otherwise.
        rotary_of: for each layer, which of them.
        attention_dropout: the share of attention weights set to zero while training.
        hidden_dropout: the same for what attention and feed-forward give.
        score_scale: of the attention's scores; ``1 / sqrt(head_size)`` if None.
        scale_by_layer: whether the scores of layer i, from 0, are divided by i + 1 besides.
        score_softcap: their bound, None for none.
    """

    layers: int
    width: int
    heads: int
    key_heads: int
    head_size: int
    inner_width: int
    activation: str
    windows: tuple[int | None, ...]
    window_of: tuple[int, ...]
    rotary: tuple[RotarySpec, ...] = ()
    rotary_of: tuple[int, ...] = ()
    layer_norm: bool = False
    norm_affine: bool = True
    final_norm: bool = True
    norm_eps: float = 1e-6
    norm_offset: float = 0.0
    qkv_bias: bool = False
    output_bias: bool = False
    mlp_bias: bool = False
    norm_behind: bool = False
    norm_in_residual: bool = False
    parallel: bool = False
    query_key_norm: bool = False
    attention_dropout: float = 0.0
    hidden_dropout: float = 0.0
    score_scale: float | None = None
    scale_by_layer: bool = False
    score_softcap: float | None = None

    def norm(self, width: int | None = None) -> nn.Cell:
        """A fresh norm, of the hidden states if no width is given."""
        if self.layer_norm:
            return LayerNorm(width or self.width, self.norm_eps, affine=self.norm_affine)
        return RMSNorm(width or self.width, self.norm_eps, self.norm_offset)


class DecoderAttention(nn.Cell):
    """The attention half of a layer; subclasses project by other weights.

    While text is generated, ``cache`` keeps the keys and values of the tokens before.
    """

    output_name: ClassVar[str] = "o_proj"

    def __init__(self, spec: DecoderSpec, layer: int):
        super().__init__()
        self.add_projections(spec)
        self.q_norm = spec.norm(spec.head_size) if spec.query_key_norm else None
        self.k_norm = spec.norm(spec.head_size) if spec.query_key_norm else None
        self.width, self.key_heads, self.head_size = spec.width, spec.key_heads, spec.head_size
        self.split_queries = SplitHeads(spec.heads)
        self.split_keys = SplitHeads(spec.key_heads)
        self.rotates = bool(spec.rotary)
        if self.rotates:
            kind = spec.rotary[spec.rotary_of[layer]]
            self.rotate_queries = SplitAndRotate(spec.heads, kind.size, kind.interleaved)
            self.rotate_keys = SplitAndRotate(spec.key_heads, kind.size, kind.interleaved)
        scale = spec.head_size**-0.5 if spec.score_scale is None else spec.score_scale
        scale = scale / (layer + 1) if spec.scale_by_layer else scale
        self.attention = Attention(
            spec.heads, spec.head_size, spec.attention_dropout, scale, spec.score_softcap
        )
        self.cache: LayerCache | None = None

    def attend_over(self, cache: LayerCache | None) -> None:
        """Keep a cache from now on, or none; a child meanwhile, so that equal layers can share a graph."""
        vars(self).pop("cache", None)
        self._cells.pop("cache", None)
        if cache is None:
            self.cache = None
        else:
            self._cells["cache"] = cache  # an assignment would rename its parameters

    def add_projections(self, spec: DecoderSpec) -> None:
        """Create the weights that `projected` and `output` use."""
        queries, keys = spec.heads * spec.head_size, spec.key_heads * spec.head_size
        self.q_proj = Linear(spec.width, queries, spec.qkv_bias)
        self.k_proj = Linear(spec.width, keys, spec.qkv_bias)
        self.v_proj = Linear(spec.width, keys, spec.qkv_bias)
        setattr(self, self.output_name, Linear(queries, spec.width, spec.output_bias))

    def projected(self, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values, (batch, length, heads * size) each."""
        return self.q_proj(hidden), self.k_proj(hidden), self.v_proj(hidden)

    def output(self, mixed: Tensor) -> Tensor:
        """The projection back, (batch, length, width)."""
        return getattr(self, self.output_name)(mixed)

    def construct(self, hidden, mask, angles, place=None):
        """
        Args:
            hidden: (batch, length, width).
            mask: of `mindpeft.ops.causal_mask.CausalMask`.
            angles: of `mindpeft.nn.rotary.RotaryTables`; not used without a rotary embedding.
            place: (1,), where in the cache the tokens go.
        """
        query, key, value = self.heads_of(hidden, angles)
        return self.output(self.mixed(query, key, value, mask, place))

    def mixed(self, query, key, value, mask, place):
        """What attention gives, (batch, length, heads * size), for the heads of `heads_of`."""
        if self.cache is None:
            return self.attention(query, key, value, mask)
        if self.cache.kernel is not None:
            return self.cache.kernel(query, key, value, mask, self.cache.keys, self.cache.values, place)
        key, value = self.cache(key, value, place)
        return self.attention(query, key, value, mask)

    def heads_of(self, hidden: Tensor, angles: tuple[Tensor, ...] | None) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values, (batch, heads, length, size), turned by their positions."""
        query, key, value = self.projected(hidden)
        if self.q_norm is not None:
            query, key = self.normed(self.q_norm, query), self.normed(self.k_norm, key)
        if self.rotates:
            query = self.rotate_queries(query, angles[0], angles[1])
            key = self.rotate_keys(key, angles[2], angles[3])
        else:
            query, key = self.split_queries(query), self.split_keys(key)
        return query, key, self.split_keys(value)

    def normed(self, norm: nn.Cell, rows: Tensor) -> Tensor:
        """Every head's columns normalised."""
        return norm(rows.reshape((*rows.shape[:-1], -1, self.head_size))).reshape(rows.shape)


class JoinedAttention(DecoderAttention):
    """One weight for queries, keys and values, in this order."""

    joined_name: ClassVar[str] = "qkv_proj"

    def add_projections(self, spec: DecoderSpec) -> None:
        queries, keys = spec.heads * spec.head_size, spec.key_heads * spec.head_size
        self.sizes = (queries, keys)
        setattr(self, self.joined_name, Linear(spec.width, queries + 2 * keys, spec.qkv_bias))
        setattr(self, self.output_name, Linear(queries, spec.width, spec.output_bias))

    def projected(self, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        joined = getattr(self, self.joined_name)(hidden)
        queries, keys = self.sizes
        return joined[..., :queries], joined[..., queries : queries + keys], joined[..., queries + keys :]


class GatedMLP(nn.Cell):
    """``down(activation(gate(x)) * up(x))`` (Shazeer, 2020)."""

    def __init__(self, spec: DecoderSpec):
        super().__init__()
        self.gate_proj = Linear(spec.width, spec.inner_width, spec.mlp_bias)
        self.up_proj = Linear(spec.width, spec.inner_width, spec.mlp_bias)
        self.down_proj = Linear(spec.inner_width, spec.width, spec.mlp_bias)
        self.gate = Gate(spec.activation)

    def construct(self, hidden):
        return self.down_proj(self.gate(self.gate_proj(hidden), self.up_proj(hidden)))


class JoinedMLP(nn.Cell):
    """The same with one weight for both."""

    joined_name: ClassVar[str] = "gate_up_proj"
    output_name: ClassVar[str] = "down_proj"

    def __init__(self, spec: DecoderSpec):
        super().__init__()
        setattr(self, self.joined_name, Linear(spec.width, 2 * spec.inner_width, spec.mlp_bias))
        setattr(self, self.output_name, Linear(spec.inner_width, spec.width, spec.mlp_bias))
        self.gate = Gate(spec.activation)
        self.split = ops.Split(-1, 2)

    def construct(self, hidden):
        gate, up = self.split(getattr(self, self.joined_name)(hidden))
        return getattr(self, self.output_name)(self.gate(gate, up))


class DecoderLayer(nn.Cell):
    """Attention and feed-forward, each behind a norm and added to what came in."""

    attention_name: ClassVar[str] = "self_attn"
    attention_class: ClassVar[type[DecoderAttention]] = DecoderAttention
    mlp_class: ClassVar[type[nn.Cell]] = GatedMLP

    def __init__(self, spec: DecoderSpec, layer: int):
        super().__init__()
        setattr(self, self.attention_name, self.attention_class(spec, layer))
        self.mlp = self.mlp_class(spec)
        self.input_layernorm = spec.norm()
        self.post_attention_layernorm = spec.norm()

    def construct(self, hidden, mask, angles, place=None):
        """The arguments are those of `DecoderAttention`."""
        attention = getattr(self, self.attention_name)
        mixed = attention(self.input_layernorm(hidden), mask, angles, place)
        normed, hidden = norm_and_sum(self.post_attention_layernorm, mixed, hidden)
        return hidden + self.mlp(normed)


class LayerStack(CheckpointingStack):
    """The layers, the norm behind them, and what is computed once for all of them."""

    layers_name: ClassVar[str] = "layers"
    norm_name: ClassVar[str] = "norm"
    mask_class: ClassVar[type[CausalMask]] = CausalMask

    def add_layers(self, spec: DecoderSpec, layer_class: type[nn.Cell]) -> None:
        """Create all of it."""
        layers = [layer_class(spec, layer) for layer in range(spec.layers)]
        setattr(self, self.layers_name, nn.CellList(layers))
        setattr(self, self.norm_name, spec.norm() if spec.final_norm else None)
        self.tables = nn.CellList([RotaryTables(kind, spec.heads, spec.key_heads) for kind in spec.rotary])
        self.masks = nn.CellList([self.mask_class(spec.heads, window) for window in spec.windows])
        self.window_of, self.rotary_of = spec.window_of, spec.rotary_of or (0,) * spec.layers

    def through(self, hidden, attention_mask, position_ids, place=None):
        """Run the layers; inside a graph.

        Args:
            hidden: (batch, length, width).
            attention_mask: see `mindpeft.ops.causal_mask.CausalMask`.
            position_ids: (batch, length) integers.
            place: (1,), with a cache: how many tokens stand in it.

        Returns:
            The normalised hidden states, and the tuple of those before each layer and of the result.
        """
        angles, masks, states = (), (), ()
        for table in self.tables:
            angles = (*angles, table(position_ids, hidden.dtype))
        if len(angles) == 0:
            angles = (None,)
        for mask in self.masks:
            masks = (*masks, mask(attention_mask, hidden.shape[:2], hidden.dtype, place))
        layers = getattr(self, self.layers_name)
        for i in range(len(self.window_of)):
            states = (*states, hidden)
            mask, turned = masks[self.window_of[i]], angles[self.rotary_of[i]]
            hidden = self.called(layers[i], hidden, mask, turned, place)
        norm = getattr(self, self.norm_name)
        if norm is not None:
            hidden = norm(hidden)
        return hidden, (*states, hidden)
