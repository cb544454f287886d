"""AdamW as graph arithmetic over one flat vector.

All trainable parameters of an adapter are small; one flat gradient makes the update a dozen operators instead
of a dozen per parameter: the graph compiles and runs faster, and a data-parallel run reduces it in one piece.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

import mindspore as ms
import numpy as np
from mindspore import Parameter, ParameterTuple, Tensor, nn, ops

from mindpeft.errors import InputError

_NO_DECAY_NAMES = {"bias", "gamma", "beta"}
_MOMENTS = ("exp_avg", "exp_avg_sq")
_each = ops.HyperMap()


def trainable_parameters(model: nn.Cell) -> dict[str, Parameter]:
    """Path in the model -> parameter, for all with ``requires_grad``; a shared one appears once."""
    unique: dict[int, tuple[str, Parameter]] = {}
    for path, parameter in model.parameters_and_names():
        if parameter.requires_grad:
            unique.setdefault(id(parameter), (path, parameter))
    return dict(unique.values())


def undecayed_names(model: nn.Cell) -> set[str]:
    """The paths of parameters that weight decay leaves alone: biases and what normalisation layers own."""
    names = {path for path, _ in model.parameters_and_names() if path.rsplit(".", 1)[-1] in _NO_DECAY_NAMES}
    for path, cell in model.cells_and_names():
        if "Norm" in type(cell).__name__:
            prefix = f"{path}." if path else ""
            names.update(prefix + name for name, _ in cell.parameters_and_names(expand=False))
    return names


def flatten(tensors: Iterable[Tensor]) -> Tensor:
    """Join tensors of any shape into one float32 vector; runs inside a graph."""
    return ops.cat(_each(_flat, tensors))


def _flat(tensor: Tensor) -> Tensor:
    return ops.reshape(tensor, (-1,)).astype(ms.float32)


class AdamW(nn.Cell):
    """Adam with decoupled weight decay (Loshchilov and Hutter, 2019), equal to ``torch.optim.AdamW``.

    The two moments are flat float32 vectors over the trainable parameters alone. Everything that changes from
    step to step comes in as a tensor (see :meth:`scalars`), so that no step compiles anew.

    Args:
        model: its parameters with ``requires_grad`` are updated; biases and norms are not decayed.
        betas, eps, weight_decay: as in torch.
        rates: path of a parameter -> the factor of its learning rate, where it is not 1.

    Raises:
        InputError: the model has no trainable parameter.
    """

    def __init__(
        self,
        model: nn.Cell,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        rates: Mapping[str, float] | None = None,
    ):
        super().__init__(auto_prefix=False)
        named = trainable_parameters(model)
        if not named:
            raise InputError("nothing to train: no parameter of the model has requires_grad=True")
        undecayed = undecayed_names(model)
        self.names = tuple(named)
        self.parameters = ParameterTuple(named.values())
        self.decays = tuple(0.0 if name in undecayed else weight_decay for name in named)
        self.rates = tuple(1.0 if rates is None else rates.get(name, 1.0) for name in named)
        self.shapes = tuple(tuple(parameter.shape) for parameter in named.values())
        self.sizes = tuple(math.prod(shape) for shape in self.shapes)
        self.beta1, self.beta2 = betas
        self.eps = eps
        self.exp_avg = self.flat_buffer("exp_avg")
        self.exp_avg_sq = self.flat_buffer("exp_avg_sq")
        self.divide = ops.RealDiv()

    def flat_buffer(self, name: str) -> Parameter:
        """A zero vector as long as all trainable parameters together, which no gradient flows into."""
        return Parameter(ops.zeros((sum(self.sizes),), ms.float32), name=f"adamw.{name}", requires_grad=False)

    def scalars(self, step: int, learning_rate: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """``step`` (from 1) and the scalars for :meth:`construct` at that step, worked out in float64."""
        step_size = learning_rate / (1.0 - self.beta1**step)
        root_scale = 1.0 / math.sqrt(1.0 - self.beta2**step)
        scalars = (Tensor(value, ms.float32) for value in (learning_rate, step_size, root_scale))
        return (Tensor(step, ms.int32), *scalars)

    def construct(
        self, gradient: Tensor, learning_rate: Tensor, step_size: Tensor, root_scale: Tensor
    ) -> tuple[Tensor, ...]:
        """Update moments and parameters from the flat ``gradient``.

        Args:
            gradient: (total,) float32.
            learning_rate: (), the decay's factor.
            step_size: (), learning rate over the first moment's bias correction.
            root_scale: (), one over the root of the second moment's bias correction.

        Returns:
            the parameters' new values: a graph that reads a parameter after its assignment may get the old.
        """
        gradient = self.direction(gradient)
        exp_avg = self.exp_avg * self.beta1 + gradient * (1.0 - self.beta1)
        exp_avg_sq = self.exp_avg_sq * self.beta2 + gradient * gradient * (1.0 - self.beta2)
        ops.assign(self.exp_avg, exp_avg)
        ops.assign(self.exp_avg_sq, exp_avg_sq)
        change = self.divide(exp_avg * step_size, self.denominator(exp_avg_sq, root_scale))
        pieces = ops.split(change, self.sizes)
        values = ()
        for i in range(len(self.sizes)):
            value = self.apply_change(i, ops.reshape(pieces[i], self.shapes[i]), learning_rate)
            values = (*values, value)
        return values

    def direction(self, gradient: Tensor) -> Tensor:
        """The vector whose moments are kept."""
        return gradient

    def denominator(self, exp_avg_sq: Tensor, root_scale: Tensor) -> Tensor:
        """What the first moment is divided by."""
        return ops.sqrt(exp_avg_sq) * root_scale + self.eps

    def apply_change(self, index: int, change: Tensor, learning_rate: Tensor) -> Tensor:
        """Decay a parameter and take ``change`` off it; returns its new value."""
        parameter = self.parameters[index]
        value = parameter.astype(ms.float32)
        if self.rates[index] != 1.0:
            change, learning_rate = change * self.rates[index], learning_rate * self.rates[index]
        if self.decays[index] > 0:
            value = value * (1.0 - learning_rate * self.decays[index])
        value = (value - change).astype(parameter.dtype)
        ops.assign(parameter, value)
        return value

    def state_dict(self) -> dict[str, np.ndarray]:
        """``exp_avg.<path>`` and ``exp_avg_sq.<path>`` -> float32 array of the parameter's shape."""
        edges = np.cumsum(self.sizes)[:-1]
        state = {}
        for moment in _MOMENTS:
            pieces = np.split(getattr(self, moment).asnumpy(), edges)
            for name, shape, piece in zip(self.names, self.shapes, pieces, strict=True):
                state[f"{moment}.{name}"] = piece.reshape(shape)
        return state

    def load_state_dict(self, state: dict[str, np.ndarray]) -> None:
        """Take over what :meth:`state_dict` gave.

        Raises:
            InputError: a tensor is missing, foreign or misshapen; nothing is changed.
        """
        wanted = {
            f"{moment}.{name}": shape
            for moment in _MOMENTS
            for name, shape in zip(self.names, self.shapes, strict=True)
        }
        odd = sorted(set(wanted) ^ set(state))
        odd += [key for key in wanted if key in state and tuple(state[key].shape) != wanted[key]]
        if odd:
            raise InputError(
                f"the optimizer state belongs to other trainable parameters: {odd[0]!r} does not fit"
            )
        for moment in _MOMENTS:
            flat = np.concatenate([state[f"{moment}.{name}"].reshape(-1) for name in self.names])
            getattr(self, moment).set_data(Tensor(flat.astype(np.float32)))
