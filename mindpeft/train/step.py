"""The compiled steps: one Cell that trains, one that evaluates."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import ClassVar

import mindspore as ms
from mindspore import Tensor, nn, ops

from mindpeft.compiling import CompiledCell
from mindpeft.errors import InputError, did_you_mean
from mindpeft.ops.cpu import kernels_on
from mindpeft.ops.cpu.adamw import AdamWKernel
from mindpeft.train.optim import AdamW, flatten
from mindpeft.tuners.hooks import TrainingHook, gradient_slices

_CALLS_PER_PARAMETER = 50
_CLIP_EPS = 1e-6  # torch.nn.utils.clip_grad_norm_ adds it to the norm


def accepted_arguments(model: nn.Cell) -> list[str]:
    """The names of the arguments that ``model`` takes; those of the model inside for a ``PeftModel``.

    A layer around the whole model may take further ones, which it lists as ``argument_names``.
    """
    if hasattr(model, "get_base_model"):
        if hasattr(model.base_model, "argument_names"):
            return list(model.base_model.argument_names)
        model = model.get_base_model()
    return [
        name
        for name, parameter in inspect.signature(model.construct).parameters.items()
        if parameter.kind is parameter.POSITIONAL_OR_KEYWORD
    ]


def argument_positions(model: nn.Cell, columns: tuple[str, ...]) -> tuple[int, ...]:
    """For each argument of ``model.construct`` the index of its column, or -1 if the batch has none.

    A graph can't be given keyword arguments by a variable name, but it can be given a fixed arrangement.

    Raises:
        InputError: a column is no argument of the model.
    """
    accepted = accepted_arguments(model)
    for column in columns:
        if column not in accepted:
            raise InputError(
                f"the batch has a column {column!r} that {type(model).__name__} does not take: "
                f"it takes {', '.join(accepted)}{did_you_mean(column, accepted)}"
            )
    return tuple(columns.index(name) if name in columns else -1 for name in accepted)


def _arrange(columns: tuple, positions: tuple[int, ...]) -> tuple:
    """The model's positional arguments, None where the batch has no such column; runs inside a graph."""
    arguments = ()
    for position in positions:
        arguments = (*arguments, None) if position < 0 else (*arguments, columns[position])
    return arguments


class TrainStep(CompiledCell):
    """Forward, loss, gradients of the trainable parameters, accumulation, clipping and AdamW in one graph.

    The gradient is taken with respect to trainable parameters only, so that the graph holds none of a frozen
    weight. A micro-batch whose group of ``accumulation_steps`` is not complete adds to a buffer, which exists
    only if ``accumulation_steps > 1``. An update with a gradient that is not finite is left out.

    Args:
        model: returns ``(loss, logits)`` when given labels.
        columns: names of the batch's columns, in the order in which :meth:`construct` gets them.
        optimizer: over the parameters of ``model``.
        accumulation_steps: micro-batches per update.
        max_grad_norm: global norm to clip to, 0 for no clipping.
        hooks: what the method of the adapter adds to the loss, and does after each update.
    """

    # What MindSpore makes of `loss` and the optimizer's parameters; see `mindpeft.structure`.
    NOT_IN_GRAPH: ClassVar[tuple[str, ...]] = ("loss_and_gradients",)

    def __init__(
        self,
        model: nn.Cell,
        columns: tuple[str, ...],
        optimizer: AdamW,
        accumulation_steps: int = 1,
        max_grad_norm: float = 1.0,
        hooks: Sequence[TrainingHook] = (),
    ):
        super().__init__(auto_prefix=False)
        self.model = model
        self.positions = argument_positions(model, columns)
        self.optimizer = optimizer
        self.accumulates = accumulation_steps > 1
        if self.accumulates:
            self.buffer = optimizer.flat_buffer("accumulated_gradient")
        self.max_grad_norm = max_grad_norm
        self.divide = ops.RealDiv()
        # Loops over parameters are unrolled as nested calls, which MindSpore limits to 1,000.
        ms.set_context(max_call_depth=max(1000, _CALLS_PER_PARAMETER * len(optimizer.parameters)))
        self.hooks = nn.CellList(list(hooks), auto_prefix=False)
        places = {id(parameter): index for index, parameter in enumerate(optimizer.parameters)}
        self.watched = tuple(tuple(places[id(parameter)] for parameter in hook.watched) for hook in hooks)
        self.kernel = self.update_kernel()
        self.loss_and_gradients = ms.value_and_grad(self.loss, None, weights=optimizer.parameters)

    def update_kernel(self) -> nn.Cell | None:
        """Clipping and AdamW in one operator, where all else that works on parameters goes with it."""
        optimizer = self.optimizer
        floats = all(parameter.dtype == ms.float32 for parameter in optimizer.parameters)
        alone = type(optimizer) is AdamW and not self.accumulates
        if not (kernels_on() and floats and alone and all(hook.joins_kernel() for hook in self.hooks)):
            return None
        betas = (optimizer.beta1, optimizer.beta2)
        return AdamWKernel(betas, optimizer.eps, self.max_grad_norm, optimizer.decays, optimizer.rates)

    def loss(self, *columns: Tensor) -> Tensor:
        loss = self.model(*_arrange(columns, self.positions))[0].astype(ms.float32)
        for hook in self.hooks:
            loss = loss + hook.penalty()
        return loss

    def construct(
        self,
        update: Tensor,
        share: Tensor,
        step: Tensor,
        learning_rate: Tensor,
        step_size: Tensor,
        root_scale: Tensor,
        *columns: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """Run one micro-batch.

        Args:
            update: () bool, whether this micro-batch ends its group; ignored without accumulation.
            share: () float32, the micro-batch's weight in its group, one over the group's size.
            step, learning_rate, step_size, root_scale: what :meth:`AdamW.scalars` gives for this update.
            columns: the batch.

        Returns:
            The micro-batch's own loss with the hooks' penalties, and the gradient's global norm before
            clipping (0 without an update).
        """
        loss, gradients = self.loss_and_gradients(*columns)
        if self.kernel is not None:
            return loss, self.apply_kernel(loss, gradients, step, (learning_rate, step_size, root_scale))
        gradient = flatten(gradients)
        if not self.accumulates:
            return loss, self.apply(gradient, step, learning_rate, step_size, root_scale)
        gradient = self.buffer + gradient * share
        norm = ops.zeros_like(loss)
        if update:
            norm = self.apply(gradient, step, learning_rate, step_size, root_scale)
            ops.assign(self.buffer, ops.zeros_like(gradient))
        else:
            ops.assign(self.buffer, gradient)
        return loss, norm

    def apply_kernel(
        self, loss: Tensor, gradients: tuple[Tensor, ...], step: Tensor, scalars: tuple
    ) -> Tensor:
        moments = (self.optimizer.exp_avg, self.optimizer.exp_avg_sq)
        norm, factor = self.kernel(gradients, self.optimizer.parameters, moments, scalars, loss)
        for i in range(len(self.watched)):
            norm = self.hooks[i].after_kernel(self.watched_by(i, gradients), (norm, factor), step)
        return norm.reshape(())

    def watched_by(self, hook: int, tensors: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Of one tensor for each parameter, those of the parameters that a hook watches."""
        own = ()
        for index in self.watched[hook]:
            own = (*own, tensors[index])
        return own

    def apply(
        self, gradient: Tensor, step: Tensor, learning_rate: Tensor, step_size: Tensor, root_scale: Tensor
    ) -> Tensor:
        norm = ops.sqrt(ops.sum(gradient * gradient))
        if ops.isfinite(norm):
            if self.max_grad_norm > 0:
                factor = self.divide(ops.ones_like(norm) * self.max_grad_norm, norm + _CLIP_EPS)
                gradient = gradient * ops.minimum(factor, 1.0)
            values = self.optimizer(gradient, learning_rate, step_size, root_scale)
            norm = ops.depend(norm, values)  # the compiler drops a branch whose results nobody wants
            if len(self.watched) > 0:
                self.call_hooks(values, gradient, step)
        return norm

    def call_hooks(self, values: tuple[Tensor, ...], gradient: Tensor, step: Tensor) -> None:
        gradients = gradient_slices(gradient, self.optimizer.sizes, self.optimizer.shapes)
        for i in range(len(self.watched)):
            self.hooks[i].after_update(self.watched_by(i, values), self.watched_by(i, gradients), step)


class EvalStep(CompiledCell):
    """The model's ``(loss, logits)``, or logits alone for batches without labels, as one graph.

    Args:
        model: as for :class:`TrainStep`.
        columns: names of the batch's columns, in the order in which :meth:`construct` gets them.
        loss_only: the loss alone.
    """

    def __init__(self, model: nn.Cell, columns: tuple[str, ...], loss_only: bool = False):
        super().__init__(auto_prefix=False)
        self.model = model
        self.positions = argument_positions(model, columns)
        self.loss_only = loss_only

    def construct(self, *columns: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        result = self.model(*_arrange(columns, self.positions))
        return result[0] if self.loss_only else result
