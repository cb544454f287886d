"""What a method may add to every training step: inside its compiled graph, and on the host after it."""

from __future__ import annotations

from collections.abc import Iterable

import mindspore as ms
from mindspore import Tensor, nn, ops


class TrainingHook(nn.Cell):
    """A term of the loss, and a rule applied after each update of the parameters; a method derives its own.

    ``penalty`` and ``after_update`` run inside the graph of the training step. Evaluation knows nothing of
    them.

    Args:
        watched: the trained parameters whose gradients ``after_update`` wants.
    """

    def __init__(self, watched: Iterable[ms.Parameter]) -> None:
        super().__init__(auto_prefix=False)
        self.watched = tuple(watched)

    def penalty(self) -> Tensor:
        """What is added to the training loss, ()."""
        return Tensor(0.0, ms.float32)

    def after_update(self, values: tuple[Tensor, ...], gradients: tuple[Tensor, ...], step: Tensor) -> None:
        """Runs after the optimizer, unless the update was left out.

        To be chosen by value, without ``if``: a graph loses the assignments in branches within branches. And
        what was assigned is to be handed on: a graph that reads a parameter then may get the old value.

        Args:
            values: those of ``watched`` after the update.
            gradients: those of ``watched`` as the optimizer had them: accumulated, and clipped.
            step: () int32, the number of this update, from 1.
        """

    def joins_kernel(self) -> bool:
        """Whether it goes with AdamW's kernel: `after_kernel` does what ``after_update`` does."""
        return type(self).after_update is TrainingHook.after_update

    def after_kernel(
        self, gradients: tuple[Tensor, ...], update: tuple[Tensor, Tensor], step: Tensor
    ) -> Tensor:
        """Runs after AdamW's kernel, also where that left the update out; see `mindpeft.ops.cpu.adamw`.

        Args:
            gradients: those of ``watched``, not clipped.
            update: the norm of all gradients and the factor that clipped them, (1,) both, to be waited for.
            step: as of ``after_update``.

        Returns:
            the norm, which waits for what is done here.
        """
        return update[0]

    def after_step(self, step: int) -> None:
        """Runs on the host after update ``step``: for what is done once and changes values alone."""

    def state(self) -> dict[str, ms.Parameter]:
        """What a checkpoint must keep so that training goes on as if it had not stopped."""
        return {}

    def write_back(self) -> None:
        """Put what training found out into the adapter's config; called before the adapter is read."""


def gradient_slices(gradient: Tensor, sizes: tuple[int, ...], shapes: tuple[tuple[int, ...], ...]) -> tuple:
    """A flat gradient as one tensor for each parameter; runs inside a graph."""
    pieces = ops.split(gradient, sizes)
    found = ()
    for i in range(len(sizes)):
        found = (*found, ops.reshape(pieces[i], shapes[i]))
    return found
