"""Activation functions, and the gated units made of them."""

from __future__ import annotations

from mindpeft.ops.cpu.library import Kernel, kernel

# Hugging Face's name of an activation -> its kernel's
ACTIVATIONS = {
    "gelu": "gelu",
    "gelu_python": "gelu",
    "gelu_new": "tanh_gelu",
    "gelu_fast": "tanh_gelu",
    "gelu_pytorch_tanh": "tanh_gelu",
    "silu": "silu",
    "swish": "silu",
    "quick_gelu": "quick_gelu",
    "sigmoid": "sigmoid",
}


class ActivationKernel(Kernel):
    """``f(x)``, for a name of ``ACTIVATIONS``.

    Args:
        less: keep x for the backward pass in bfloat16, as one more output.
    """

    def __init__(self, name: str, less: bool = False):
        super().__init__()
        self.name, self.less = name, less
        backward = kernel(f"{ACTIVATIONS[name]}_grad", lambda x, _: x)

        def gradients(x, out, dout):
            return (backward(out[1], dout[0]) if less else backward(x, dout),)

        self.forward = kernel(ACTIVATIONS[name], lambda x: (x, x) if less else x, 1, gradients, int(less))

    def construct(self, x):
        return self.forward(x)[0] if self.less else self.forward(x)

    def keeping_less(self) -> ActivationKernel:
        return ActivationKernel(self.name, less=True)


class GateKernel(Kernel):
    """``f(gate) * up``, for a name of ``ACTIVATIONS``.

    Args:
        less: keep gate and up for the backward pass in bfloat16, as two more outputs.
    """

    def __init__(self, name: str, less: bool = False):
        super().__init__()
        self.name, self.less = name, less
        backward = kernel(f"{ACTIVATIONS[name]}_gate_grad", lambda gate, *_: (gate, gate), 2)

        def gradients(gate, up, out, dout):
            return backward(out[1], out[2], dout[0]) if less else backward(gate, up, dout)

        def shapes(gate, _):
            return (gate, gate, gate) if less else gate

        self.forward = kernel(f"{ACTIVATIONS[name]}_gate", shapes, 1, gradients, 2 * less)

    def construct(self, gate, up):
        return self.forward(gate, up)[0] if self.less else self.forward(gate, up)

    def keeping_less(self) -> GateKernel:
        return GateKernel(self.name, less=True)
