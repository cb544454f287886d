"""Optimizers made for LoRA: LoRA+ (another learning rate for B) and LoRA-FA (A frozen, B projected)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import mindspore as ms
import numpy as np
from mindspore import Parameter, Tensor, nn, ops

from mindpeft.errors import InputError
from mindpeft.parameters import assign
from mindpeft.train.optim import AdamW, trainable_parameters
from mindpeft.tuners.lora_layers import LoraLayer, LoraLinear

if TYPE_CHECKING:
    from mindpeft.train.arguments import TrainingArguments

_FROZEN = "frozen."
_RIDGE = 1e-8  # added to A A^T, as in PEFT


def make_optimizer(model: nn.Cell, args: TrainingArguments) -> AdamW:
    """The optimizer that the arguments ask for, over the trainable parameters of ``model``.

    Raises:
        InputError: nothing is trainable, or the adapter does not suit the optimizer.
    """
    options = (model, (args.adam_beta1, args.adam_beta2), args.adam_epsilon, args.weight_decay)
    if args.optim == "lorafa":
        return LoraFA(*options)
    if args.loraplus_lr_ratio is None:
        return AdamW(*options)
    embedding = args.loraplus_lr_embedding / args.learning_rate
    return AdamW(*options, loraplus_rates(model, args.loraplus_lr_ratio, embedding))


def loraplus_rates(model: nn.Cell, ratio: float, embedding: float) -> dict[str, float]:
    """Factors of the learning rate by parameter (LoRA+, Hayou et al. 2024), as PEFT sorts parameters.

    Args:
        model: has a LoRA adapter.
        ratio: the factor of B, and of every other vector that is trained (biases).
        embedding: the factor of A and B of embeddings.

    Returns:
        path of a trainable parameter -> its factor.

    Raises:
        InputError: no B is trained.
    """
    trained = trainable_parameters(model)
    if not any(_is_second(name) or "lora_embedding_" in name for name in trained):
        raise InputError("loraplus_lr_ratio is for LoRA, but no LoRA adapter is trained")
    rates = {}
    for name, parameter in trained.items():
        is_fast = _is_second(name) or parameter.ndim == 1
        rates[name] = embedding if "lora_embedding_" in name else ratio if is_fast else 1.0
    return rates


def _is_second(name: str) -> bool:
    return ".lora_B." in f".{name}"


class LoraFA(AdamW):
    """LoRA-FA (Zhang et al. 2023), equal to PEFT's: A stays as it is, and B's gradient is multiplied by
    (A A^T)^-1 / s^2, which makes the step of s B A the nearest possible to a step of the whole weight.

    What else is trained gets AdamW's step. Epsilon is added before the second moment's correction, and the
    decay comes after the step, as in transformers' first AdamW, on which PEFT's is built.

    Args:
        model: its LoRA adapter's A is frozen by this.
        betas, eps, weight_decay: as for :class:`AdamW`.

    Raises:
        InputError: no LoRA adapter is trained, or one of embeddings, convolutions, or with DoRA or a bias.
    """

    def __init__(
        self,
        model: nn.Cell,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
    ):
        layers = _trained_layers(model)
        for layer in layers.values():
            layer.lora_A.weight.requires_grad = False
        super().__init__(model, betas, eps, weight_decay)
        self.layers = tuple(layers.values())
        self.frozen = {path: layer.lora_A.weight for path, layer in layers.items()}
        places = {id(parameter): index for index, parameter in enumerate(self.parameters)}
        numbers = {places[id(layer.lora_B.weight)]: number for number, layer in enumerate(self.layers)}
        self.projected = tuple(numbers.get(index, -1) for index in range(len(self.parameters)))
        projections = [
            Parameter(Tensor(_projection(layer)), name=f"lorafa.{number}", requires_grad=False)
            for number, layer in enumerate(self.layers)
        ]
        self.projections = ms.ParameterTuple(projections)
        self.matmul = ops.MatMul()

    def direction(self, gradient: Tensor) -> Tensor:
        pieces = ops.split(gradient, self.sizes)
        found = ()
        for i in range(len(self.sizes)):
            piece = pieces[i]
            if self.projected[i] >= 0:
                piece = self.matmul(ops.reshape(piece, self.shapes[i]), self.projections[self.projected[i]])
            found = (*found, ops.reshape(piece, (-1,)))
        return ops.cat(found)

    def denominator(self, exp_avg_sq: Tensor, root_scale: Tensor) -> Tensor:
        return (ops.sqrt(exp_avg_sq) + self.eps) * root_scale

    def apply_change(self, index: int, change: Tensor, learning_rate: Tensor) -> Tensor:
        parameter = self.parameters[index]
        value = parameter.astype(ms.float32) - change
        if self.decays[index] > 0:
            value = value * (1.0 - learning_rate * self.decays[index])
        value = value.astype(parameter.dtype)
        ops.assign(parameter, value)
        return value

    def state_dict(self) -> dict[str, np.ndarray]:
        """The moments, and A, which training needs as it was: ``frozen.<path>``."""
        return super().state_dict() | {_FROZEN + path: a.asnumpy().copy() for path, a in self.frozen.items()}

    def load_state_dict(self, state: dict[str, np.ndarray]) -> None:
        kept = {
            name.removeprefix(_FROZEN): value for name, value in state.items() if name.startswith(_FROZEN)
        }
        if {name: value.shape for name, value in kept.items()} != {
            n: a.shape for n, a in self.frozen.items()
        }:
            raise InputError("the optimizer state is not LoRA-FA's for this adapter")
        super().load_state_dict({name: v for name, v in state.items() if not name.startswith(_FROZEN)})
        for path, value in kept.items():
            assign(self.frozen[path], value)
        for layer, projection in zip(self.layers, self.projections, strict=True):
            assign(projection, _projection(layer))


def _trained_layers(model: nn.Cell) -> dict[str, LoraLinear]:
    """The LoRA layers that are trained, by path."""
    layers = {}
    for path, cell in model.cells_and_names():
        if isinstance(cell, LoraLayer) and any(cell.slot(name).requires_grad for name in cell.slot_shapes):
            if type(cell) is not LoraLinear or cell.biased:
                raise InputError(
                    f'optim="lorafa" is for LoRA on linear cells without lora_bias, not for {path!r} '
                    f"({type(cell).__name__})"
                )
            layers[path] = cell
    if not layers:
        raise InputError('optim="lorafa" is for LoRA, but no LoRA adapter is trained')
    return layers


def _projection(layer: LoraLinear) -> np.ndarray:
    """(A A^T)^-1 / s^2, (r, r), in float32; zero where a slot is larger than its adapter."""
    a = layer.lora_A.weight.asnumpy().astype(np.float64)
    gram = a @ a.T + _RIDGE * np.eye(len(a))
    cutoff = len(a) * np.finfo(np.float32).eps  # torch's
    scaling = float(layer.scaling.asnumpy())
    return (np.linalg.pinv(gram, cutoff, hermitian=True) / scaling**2).astype(np.float32)
