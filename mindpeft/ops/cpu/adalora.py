"""AdaLoRA's term of the loss, and its pruning after an update, for all layers at once."""

from __future__ import annotations

from collections.abc import Sequence

from mindspore import Parameter, Tensor

from mindpeft.ops.cpu.library import Kernel, kernel, setting


class PenaltyKernel(Kernel):
    """How far all A A^T and B^T B are from the identity in Frobenius' norm, summed and weighted, (1,).

    Args:
        weight: of the sum.
        ranks: those in use in each layer; its A and B may have room for more.
    """

    def __init__(self, weight: float, ranks: Sequence[int]):
        super().__init__()
        self.settings = setting(weight, *ranks)
        count = 2 * len(ranks)
        self.forward = kernel("adalora_penalty", lambda *_: (1,))
        self.backward = kernel("adalora_penalty_grad", lambda *shapes: shapes[:count], count, factors=count)

    def construct(self, factors: tuple[Tensor, ...]) -> Tensor:
        """
        Args:
            factors: A (r, in) and B (out, r) of each layer in turn.
        """
        return self.forward(*factors, self.settings)

    def bprop(self, factors, out, dout):  # of the Cell: an operator's can't have any number of inputs
        return (self.backward(*factors, self.settings, dout),)


class PruneKernel(Kernel):
    """Smooths importances and zeroes the least important values in place; returns the gradients' norm, (1,).

    As `mindpeft.ops.cpu.adamw.AdamWKernel` it writes what MindSpore does not know of, and comes after that.

    Args:
        betas: of importance and uncertainty.
        ranks: those in use in each layer.
    """

    def __init__(self, betas: tuple[float, float], ranks: Sequence[int]):
        super().__init__()
        self.settings = setting(*betas, *ranks)
        self.forward = kernel("adalora_prune", lambda *_: (1,))

    def construct(
        self,
        gradients: tuple[Tensor, ...],
        parameters: tuple[Parameter, ...],
        state: tuple[Parameter, Parameter, Parameter],
        schedule: tuple[Parameter, Tensor],
        update: tuple[Tensor, Tensor],
    ) -> Tensor:
        """
        Args:
            gradients, parameters: A, E and B of each layer in turn; the gradients before clipping.
            state: importances, uncertainties, and which triplets are kept.
            schedule: how many triplets to prune at each update, and the update.
            update: what AdamW's kernel returned.
        """
        return self.forward(*gradients, *parameters, *state, *schedule, *update, self.settings)
