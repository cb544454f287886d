"""AdamW over all trained parameters at once."""

from __future__ import annotations

from collections.abc import Sequence

from mindspore import Tensor

from mindpeft.ops.cpu.library import Kernel, kernel, setting


class AdamWKernel(Kernel):
    """Clips gradients and updates parameters and moments in place.

    MindSpore does not know that the kernel writes: one operator stands for some ten of each parameter, which
    take most of a training step's compilation. It waits for the loss and all gradients; who reads or writes
    the parameters later in the same graph must wait for what it returns, and may not use ``ops.assign``:
    MindSpore would hand the parameters' earlier readers, the kernel among them, a copy.

    Args:
        betas, eps: of AdamW.
        max_grad_norm: global norm to clip to, 0 for no clipping.
        decays: for each parameter.
        rates: for each parameter, the factor of its learning rate.
    """

    def __init__(
        self,
        betas: tuple[float, float],
        eps: float,
        max_grad_norm: float,
        decays: Sequence[float],
        rates: Sequence[float],
    ):
        super().__init__()
        self.settings = setting(*betas, eps, max_grad_norm, *decays, *rates)
        self.forward = kernel("adamw", lambda *_: ((1,), (1,)), 2)

    def construct(
        self,
        gradients: tuple[Tensor, ...],
        parameters: tuple[Tensor, ...],
        moments: tuple[Tensor, Tensor],
        scalars: tuple[Tensor, Tensor, Tensor],
        loss: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """
        Args:
            gradients, parameters: in the order of ``decays``.
            moments: flat, over all parameters.
            scalars: learning rate, step size and root scale of `mindpeft.train.optim.AdamW.scalars`.
            loss: (), of which all is computed before.

        Returns:
            the gradients' norm and the factor that clipped them, (1,) both.
        """
        return self.forward(*gradients, *parameters, *moments, *scalars, self.settings, loss)
