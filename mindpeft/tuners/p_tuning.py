"""P-tuning: a small network makes the T embeddings in front of the text's while training.

Liu et al. 2021, "GPT Understands, Too". The network is an MLP, or a bidirectional LSTM with an MLP behind it,
over T trained embeddings. A file holds its output alone, from which training may go on without the network.
``prompt_learning`` says how virtual tokens meet masks, positions, token types, labels and outputs. For what
is called P-tuning v2 see ``prefix_tuning``.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any, ClassVar

import mindspore as ms
import numpy as np
from mindspore import nn, ops

from mindpeft.config import PeftType, register_method
from mindpeft.ops.device import on_cpu
from mindpeft.ops.dropout import dropout
from mindpeft.ops.linear import linear
from mindpeft.ops.lstm import bidirectional_lstm
from mindpeft.tuners.base import Shapes, Site, Slot, Tensors
from mindpeft.tuners.prompt_layers import PromptLayer
from mindpeft.tuners.prompt_learning import (
    EMBEDDING,
    OUTPUT,
    PromptLearningConfig,
    check_arguments,
    encoder_tensors,
    find_embedding,
)
from mindpeft.tuners.targeted import check_choice, check_count, check_rate

if TYPE_CHECKING:
    from mindpeft.tuners.plan import BaseModel

# The parts of the network.
_DENSE = "prompt_encoder.mlp_head"
_RECURRENT = "prompt_encoder.lstm_head"
_GATES = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")

logger = logging.getLogger(__name__)


@register_method
@dataclass
class PromptEncoderConfig(PromptLearningConfig):
    """Hugging Face PEFT's configuration of P-tuning, key by key; see also ``PromptLearningConfig``.

    Attributes:
        encoder_reparameterization_type: "MLP" or "LSTM".
        encoder_hidden_size: the network's inner width; ``token_dim`` if ``None``.
        encoder_num_layers: how many layers the LSTM has; an MLP always has three.
        encoder_dropout: dropout between the layers of the LSTM while training.

    Raises:
        InputError: a value is not allowed.
    """

    encoder_reparameterization_type: str = "MLP"
    encoder_hidden_size: int | None = None
    encoder_num_layers: int = 2
    encoder_dropout: float = 0.0

    METHOD: ClassVar[PeftType] = PeftType.P_TUNING

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("encoder_reparameterization_type", self.encoder_reparameterization_type, ("MLP", "LSTM"))
        if self.encoder_hidden_size is not None:
            check_count("encoder_hidden_size", self.encoder_hidden_size)
        check_count("encoder_num_layers", self.encoder_num_layers)
        check_rate("encoder_dropout", self.encoder_dropout)

    def resolve(self, base: BaseModel) -> None:
        super().resolve(base)
        self.encoder_hidden_size = self.encoder_hidden_size or self.token_dim

    def slot_classes(self, base: BaseModel) -> dict[str, type[Slot]]:
        check_arguments(base.model, self.peft_type.value, "input_ids", "inputs_embeds")
        find_embedding(base.model)
        return {"": PromptEncoder}


class PromptEncoder(PromptLayer):
    """The network, or its output as a file has it."""

    def __init__(self, base_layer: nn.Cell, *slot: Any) -> None:
        self.recurrent, self.dense = (), ()  # names of the tensors of each layer
        super().__init__(base_layer, *slot)
        self.dropout = dropout(0.0)
        self.fused = on_cpu()

    @classmethod
    def tensor_shapes(cls, site: Site) -> Shapes:
        (count, width), inner = cls.width_of(site), site.config.encoder_hidden_size
        shapes = {EMBEDDING: (count, width)}
        widths = [width, inner, inner, width]
        if site.config.encoder_reparameterization_type == "LSTM":
            for layer in range(site.config.encoder_num_layers):
                sizes = (
                    (4 * inner, 2 * inner if layer else width),
                    (4 * inner, inner),
                    (4 * inner,),
                    (4 * inner,),
                )
                for way in ("", "_reverse"):
                    names = (f"{_RECURRENT}.{gate}_l{layer}{way}" for gate in _GATES)
                    shapes |= dict(zip(names, sizes, strict=True))
            widths = [2 * inner, 2 * inner, width]
        for layer, (n_in, n_out) in enumerate(pairwise(widths)):
            shapes[f"{_DENSE}.{2 * layer}.weight"] = (n_out, n_in)
            shapes[f"{_DENSE}.{2 * layer}.bias"] = (n_out,)
        return shapes

    @classmethod
    def initial_tensors(cls, site: Site) -> Tensors:
        config = site.config
        if config.encoder_reparameterization_type == "MLP":
            for key, default in (("encoder_num_layers", 2), ("encoder_dropout", 0.0)):
                if getattr(config, key) != default:
                    logger.warning("%s has no effect on an encoder of the type MLP", key)
        tensors = encoder_tensors(cls.tensor_shapes(site))
        bound = config.encoder_hidden_size**-0.5  # torch's for all of an LSTM's tensors
        for name, value in tensors.items():
            if name.startswith(_RECURRENT):
                tensors[name] = np.random.uniform(-bound, bound, value.shape).astype(np.float32)
        return tensors

    @classmethod
    def to_file(cls, site: Site, tensors: Tensors) -> Tensors:
        if OUTPUT in tensors:
            return tensors
        recurrent, dense = layer_names(tensors)
        values = {name.removeprefix("prompt_encoder."): ms.Tensor(value) for name, value in tensors.items()}
        output = encode(
            values["embedding.weight"],
            tuple(tuple(values[f"lstm_head.{name}"] for name in layer) for layer in recurrent),
            tuple((values[f"mlp_head.{name}.weight"], values[f"mlp_head.{name}.bias"]) for name in dense),
            None,
            on_cpu(),
        )
        return {OUTPUT: output.asnumpy()}

    def configure(self, config: PromptEncoderConfig, trainable: bool) -> bool:
        changed = super().configure(config, trainable)
        if trainable and self.dropout.p != config.encoder_dropout:
            self.dropout, changed = dropout(config.encoder_dropout).set_train(self.training), True
        return changed

    def reserve(self, shapes: Shapes) -> bool:
        changed = super().reserve(shapes)
        self.recurrent, self.dense = layer_names(self.slot_shapes)
        return changed

    def prompts(self, arguments: tuple) -> ms.Tensor:
        if len(self.dense) == 0:
            return self.prompt_embeddings
        recurrent, dense = (), ()
        for names in self.recurrent:
            weights = ()
            for name in names:
                weights = (*weights, getattr(self.prompt_encoder.lstm_head, name))
            recurrent = (*recurrent, weights)
        for name in self.dense:
            layer = getattr(self.prompt_encoder.mlp_head, name)
            dense = (*dense, (layer.weight, layer.bias))
        return encode(self.prompt_encoder.embedding.weight, recurrent, dense, self.dropout, self.fused)


def layer_names(tensors: Iterable[str]) -> tuple[tuple[tuple[str, ...], ...], tuple[str, ...]]:
    """The tensors of each layer of the LSTM, and the names of the MLP's layers; none for an output alone."""
    leaves = [name.rpartition(".")[2] for name in tensors if name.startswith(_RECURRENT)]
    per_layer = 2 * len(_GATES)
    recurrent = tuple(tuple(leaves[i : i + per_layer]) for i in range(0, len(leaves), per_layer))
    dense = tuple(
        name.split(".")[2] for name in tensors if name.startswith(_DENSE) and name.endswith(".weight")
    )
    return recurrent, dense


def encode(
    x: ms.Tensor, recurrent: tuple, dense: tuple, dropout_cell: nn.Cell | None, fused: bool
) -> ms.Tensor:
    """The network's output, (T, width); runs inside a graph and outside.

    Args:
        x: (T, width).
        recurrent: the weights of each layer of the LSTM, see ``bidirectional_lstm``; () for none.
        dense: weight and bias of each layer of the MLP.
        dropout_cell: acts between the layers of the LSTM.
        fused: see ``bidirectional_lstm``.
    """
    for layer in range(len(recurrent)):
        if layer > 0 and dropout_cell is not None:
            x = dropout_cell(x)
        x = bidirectional_lstm(x, recurrent[layer], fused)
    for layer in range(len(dense)):
        x = linear(ops.relu(x) if layer > 0 else x, dense[layer][0], dense[layer][1])
    return x
