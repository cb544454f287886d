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
}


class ActivationKernel(Kernel):
    """``f(x)``, for a name of ``ACTIVATIONS``."""

    def __init__(self, name: str):
        super().__init__()
        backward = kernel(f"{ACTIVATIONS[name]}_grad", lambda x, _: x)

        def gradients(x, out, dout):
            return (backward(x, dout),)

        self.forward = kernel(ACTIVATIONS[name], lambda x: x, gradients=gradients)

    def construct(self, x):
        return self.forward(x)


class GateKernel(Kernel):
    """``f(gate) * up``, for a name of ``ACTIVATIONS``."""

    def __init__(self, name: str):
        super().__init__()
        backward = kernel(f"{ACTIVATIONS[name]}_gate_grad", lambda gate, *_: (gate, gate), 2)

        def gradients(gate, up, out, dout):
            return backward(gate, up, dout)

        self.forward = kernel(f"{ACTIVATIONS[name]}_gate", lambda gate, _: gate, gradients=gradients)

    def construct(self, gate, up):
        return self.forward(gate, up)
