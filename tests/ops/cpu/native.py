"""The kernels' C functions, called as MindSpore calls them, but by ctypes: no MindSpore and no graph."""

from __future__ import annotations

import ctypes
from functools import partial
from pathlib import Path

import numpy as np

from tests.ops.cotangent import cotangent

TYPES = {"float32": b"float32", "int32": b"int32", "uint16": b"bfloat16", "int8": b"int8"}
GUARD = 17  # numbers around an output; odd, so that no output begins where a vector would
# What an output holds before the call, in 32 bits or 16: NaNs that no kernel makes.
UNTOUCHED, UNTOUCHED_HALF = 0x7FC0BEEF, 0x7FAB
ACTIVATIONS = ("gelu", "tanh_gelu", "silu", "quick_gelu", "sigmoid")  # the kernels' names
SILENCE = np.array([0, 1, 0, 0], np.float32)  # noise for no dropout
Shape = tuple[int, ...]


class Kernels:
    """One built library."""

    def __init__(self, path: str | Path):
        self.library = ctypes.CDLL(str(path))

    def call(self, name: str, *tensors: np.ndarray) -> None:
        """Call a kernel: its inputs, then its outputs, as ``MINDPEFT_KERNEL`` in ``src/`` documents them."""
        assert all(tensor.flags.c_contiguous for tensor in tensors)
        count = len(tensors)
        data = (ctypes.c_void_p * count)(*(tensor.ctypes.data for tensor in tensors))
        ranks = (ctypes.c_int * count)(*(tensor.ndim for tensor in tensors))
        # An array of length 0 has no address that a kernel may look at.
        axes = [(ctypes.c_int64 * max(tensor.ndim, 1))(*tensor.shape) for tensor in tensors]
        shapes = (ctypes.POINTER(ctypes.c_int64) * count)(
            *(ctypes.cast(axis, ctypes.POINTER(ctypes.c_int64)) for axis in axes)
        )
        types = (ctypes.c_char_p * count)(*(TYPES[tensor.dtype.name] for tensor in tensors))
        assert self.library[name](count, data, ranks, shapes, types, None, None) == 0

    def compute(
        self, name: str, *inputs: np.ndarray, to: list[Shape], kept: list[Shape] | None = None
    ) -> list[np.ndarray]:
        """The outputs of the given shapes; nothing beside them, and no input, may have been written.

        Those of ``kept``, behind the others, are of bfloat16.
        """
        narrow = [False] * len(to) + [True] * len(kept or ())
        shapes = [*to, *(kept or ())]
        buffers = [
            np.full(int(np.prod(shape)) + 2 * GUARD, UNTOUCHED_HALF, np.uint16)
            if half
            else np.full(int(np.prod(shape)) + 2 * GUARD, UNTOUCHED, np.uint32)
            for shape, half in zip(shapes, narrow, strict=True)
        ]
        outputs = [
            buffer[GUARD : buffer.size - GUARD].view(np.uint16 if half else np.float32).reshape(shape)
            for buffer, shape, half in zip(buffers, shapes, narrow, strict=True)
        ]
        before = [value.copy() for value in inputs]
        self.call(name, *inputs, *outputs)
        for buffer, half in zip(buffers, narrow, strict=True):
            untouched = UNTOUCHED_HALF if half else UNTOUCHED
            assert (buffer[:GUARD] == untouched).all(), f"{name} wrote before its output"
            assert (buffer[buffer.size - GUARD :] == untouched).all(), f"{name} wrote behind its output"
            assert not (buffer[GUARD : buffer.size - GUARD] == untouched).any(), f"{name} left numbers unset"
        for value, kept in zip(inputs, before, strict=True):
            assert value.tobytes() == kept.tobytes(), f"{name} wrote to an input"
        return [output.copy() for output in outputs]

    def one(self, name: str, *inputs: np.ndarray, to: Shape) -> np.ndarray:
        """The same for a kernel with one output."""
        return self.compute(name, *inputs, to=[to])[0]


def to_bfloat16(numbers: np.ndarray) -> np.ndarray:
    """The upper halves of float32 numbers that bfloat16 holds exactly."""
    return (np.ascontiguousarray(numbers).view(np.uint32) >> 16).astype(np.uint16)


def from_bfloat16(halves: np.ndarray) -> np.ndarray:
    return (halves.astype(np.uint32) << 16).view(np.float32).reshape(halves.shape)


def keep(kernels: Kernels, name: str, inputs, outputs, tensors) -> list[np.ndarray]:
    """Call a kernel that keeps tensors for the backward pass in bfloat16, and return these.

    Its outputs must be the same as without, and what it keeps the tensors to the nearest.
    """
    to = [value.shape for value in outputs]
    found = kernels.compute(name, *inputs, to=to, kept=[x.shape for x in tensors])
    again, kept = found[: len(to)], found[len(to) :]
    for value, other in zip(again, outputs, strict=True):
        np.testing.assert_array_equal(value, other)
    for halves, x in zip(kept, tensors, strict=True):
        with np.errstate(invalid="ignore"):
            far = np.abs(from_bfloat16(halves) - x) > np.maximum(np.abs(x) * 2.0**-8, 1e-38)
        assert not (far & np.isfinite(x)).any()
        np.testing.assert_array_equal(np.isfinite(from_bfloat16(halves)), np.isfinite(x))
    return kept


def same_gradients(kernels: Kernels, name: str, kept, rest, to: list[Shape]) -> None:
    """A gradient kernel reads kept tensors in bfloat16 as it reads the same numbers in float32.

    ``rest`` are its other inputs, each with its place.
    """
    calls = []
    for tensors in (kept, [from_bfloat16(halves) for halves in kept]):
        inputs = list(tensors)
        for place, value in rest:
            inputs.insert(place, value)
        calls.append(kernels.compute(name, *inputs, to=to))
    for narrow, wide in zip(*calls, strict=True):
        np.testing.assert_allclose(narrow, wide, rtol=1e-6, atol=1e-6 * np.abs(wide).max(initial=0))


def rows_of(x: np.ndarray) -> int:
    return int(np.prod(x.shape[:-1]))


# Each family below is (kernels, what gets a gradient ..., what gets none ...) -> [value, gradients ...], the
# gradients of sum(value * cotangent(value.shape)).


def linear(kernels: Kernels, x, weight, *bias, turned=False):
    name = ("linear_turned" if turned else "linear") + ("_bias" if bias else "")
    y = kernels.one(name, x, weight, *bias, to=(*x.shape[:-1], weight.shape[turned]))
    dy = cotangent(y.shape)
    dx = kernels.one("linear_turned_grad" if turned else "linear_grad", dy, weight, to=x.shape)
    return [y, dx, *_weight_and_bias(kernels, x, weight, dy, bias, turned)]


def _weight_and_bias(kernels: Kernels, x, weight, dy, bias, turned):
    rows = (dy, x) if turned else (x, dy)
    dweight = kernels.one("linear_grad_weight", *rows, to=weight.shape)
    return [dweight, *(kernels.one("sum_rows", dy, to=one.shape) for one in bias)]


def delta_linear(kernels: Kernels, x, weight, delta, *bias):
    name = "delta_linear" + ("_bias" if bias else "")
    y = kernels.one(name, x, weight, delta, *bias, to=(*x.shape[:-1], weight.shape[0]))
    dy = cotangent(y.shape)
    dx = kernels.one("delta_linear_grad", dy, weight, delta, to=x.shape)
    dweight, *dbias = _weight_and_bias(kernels, x, weight, dy, bias, False)
    return [y, dx, dweight, dweight, *dbias]


def sparse_delta_linear(kernels: Kernels, x, weight, values, *rest):
    *bias, places = rest
    name = "sparse_delta_linear"
    inputs = (x, weight, values, places, *bias)
    y = kernels.one(name + ("_bias" if bias else ""), *inputs, to=(*x.shape[:-1], weight.shape[0]))
    dy = cotangent(y.shape)
    dx = kernels.one(f"{name}_grad", dy, weight, values, places, to=x.shape)
    dvalues = kernels.one(f"{name}_grad_values", x, dy, places, to=values.shape)
    dweight, *dbias = _weight_and_bias(kernels, x, weight, dy, bias, False)
    return [y, dx, dweight, dvalues, *dbias]


def kron_linear(kernels: Kernels, x, left, right):
    y = kernels.one("kron_linear", x, left, right, to=(*x.shape[:-1], left.shape[0] * right.shape[0]))
    dy = cotangent(y.shape)
    dx = kernels.one("kron_linear_grad", dy, left, right, to=x.shape)
    pair = kernels.compute("kron_linear_grad_pair", x, left, right, dy, to=[left.shape, right.shape])
    return [y, dx, *pair]


def int8_linear(kernels: Kernels, x, weight, scale):
    y = kernels.one("int8_linear", x, weight, scale, to=(*x.shape[:-1], weight.shape[0]))
    return [y, kernels.one("int8_linear_grad", cotangent(y.shape), weight, scale, to=x.shape)]


def int8_linear_bias(kernels: Kernels, x, bias, weight, scale):
    y = kernels.one("int8_linear_bias", x, weight, scale, bias, to=(*x.shape[:-1], weight.shape[0]))
    dy = cotangent(y.shape)
    dx = kernels.one("int8_linear_grad", dy, weight, scale, to=x.shape)
    return [y, dx, kernels.one("sum_rows", dy, to=bias.shape)]


def lora(kernels: Kernels, x, weight, a, b, scale):
    return _lora(kernels, x, weight, a, b, scale)


def lora_bias(kernels: Kernels, x, weight, a, b, bias, scale):
    return _lora(kernels, x, weight, a, b, scale, bias)


def lora_turned(kernels: Kernels, x, weight, a, b, scale):
    return _lora(kernels, x, weight, a, b, scale, turned=True)


def lora_turned_bias(kernels: Kernels, x, weight, a, b, bias, scale):
    return _lora(kernels, x, weight, a, b, scale, bias, turned=True)


def _lora(kernels: Kernels, x, weight, a, b, scale, *bias, noise=SILENCE, turned=False):
    name = "lora_linear_turned" if turned else "lora_linear"
    to = [(*x.shape[:-1], weight.shape[turned]), (rows_of(x), a.shape[0])]
    inputs = (x, weight, a, b, scale, noise)
    y, hidden = kernels.compute(name + ("_bias" if bias else ""), *inputs, *bias, to=to)
    dy = cotangent(y.shape)
    dx = kernels.one(f"{name}_grad", *inputs, hidden, dy, to=x.shape)
    da, db = kernels.compute(f"{name}_grad_pair", *inputs, hidden, dy, to=[a.shape, b.shape])
    kept = kernels.compute("narrow", x, to=[], kept=[x.shape])
    again = kernels.compute(name + ("_bias" if bias else ""), *inputs, *bias, *kept, to=to)
    np.testing.assert_array_equal(again[0], y)
    if all(np.isfinite(value).all() for value in inputs):
        rest = [*enumerate(inputs[1:], 1), (6, hidden), (7, dy)]
        same_gradients(kernels, f"{name}_grad", kept, rest, [x.shape])
        same_gradients(kernels, f"{name}_grad_pair", kept, rest, [a.shape, b.shape])
    dweight, *dbias = _weight_and_bias(kernels, x, weight, dy, bias, turned)
    return [y, dx, dweight, da, db, *dbias]


def attention(kernels: Kernels, q, k, v, settings):
    return _attention(kernels, "attention", q, k, v, settings)


def masked_attention(kernels: Kernels, q, k, v, mask, settings):
    return _attention(kernels, "masked_attention", q, k, v, mask, settings)


def _attention(kernels: Kernels, name, *inputs, noise=SILENCE):
    q, k, v = inputs[:3]
    inputs = (*inputs, noise)
    batch, heads, length, _ = q.shape
    to = [(batch, length, heads * v.shape[-1]), (2, batch, heads, length)]
    out, logs = kernels.compute(name, *inputs, to=to)
    dout = cotangent(out.shape)
    to = [q.shape, k.shape, v.shape]
    gradients = kernels.compute(f"{name}_grad", *inputs, out, logs, dout, to=to)
    kept = keep(kernels, name, inputs, [out, logs], [q, k, v, out])
    if all(np.isfinite(value).all() for value in inputs):
        rest = [*enumerate(inputs[3:], 3), (len(inputs) + 1, logs), (len(inputs) + 2, dout)]
        same_gradients(kernels, f"{name}_grad", kept, rest, to)
    return [out, *gradients]


def lora_with_dropout(kernels: Kernels, noise, *inputs):
    return _lora(kernels, *inputs, noise=noise)


def attention_with_dropout(kernels: Kernels, noise, *inputs):
    return _attention(kernels, "masked_attention", *inputs, noise=noise)


def rms_norm(kernels: Kernels, x, weight, eps):
    y, scale = kernels.compute("rms_norm", x, weight, eps, to=[x.shape, (rows_of(x),)])
    dy = cotangent(y.shape)
    dx = kernels.one("rms_norm_grad", x, weight, scale, dy, to=x.shape)
    kept = keep(kernels, "rms_norm", (x, weight, eps), [y, scale], [x])
    if np.isfinite(x).all():
        same_gradients(kernels, "rms_norm_grad", kept, [(1, weight), (2, scale), (3, dy)], [x.shape])
        same_gradients(kernels, "rms_norm_grad_weight", kept, [(1, scale), (2, dy)], [weight.shape])
    return [y, dx, kernels.one("rms_norm_grad_weight", x, scale, dy, to=weight.shape)]


def layer_norm(kernels: Kernels, x, weight, bias, eps):
    to = [x.shape, (rows_of(x),), (rows_of(x),)]
    y, mean, scale = kernels.compute("layer_norm", x, weight, bias, eps, to=to)
    dy = cotangent(y.shape)
    dx = kernels.one("layer_norm_grad", x, weight, mean, scale, dy, to=x.shape)
    dweight = kernels.one("layer_norm_grad_weight", x, mean, scale, dy, to=weight.shape)
    kept = keep(kernels, "layer_norm", (x, weight, bias, eps), [y, mean, scale], [x])
    if np.isfinite(x).all():
        rest = [(1, weight), (2, mean), (3, scale), (4, dy)]
        same_gradients(kernels, "layer_norm_grad", kept, rest, [x.shape])
        same_gradients(kernels, "layer_norm_grad_weight", kept, rest[1:], [weight.shape])
    return [y, dx, dweight, kernels.one("sum_rows", dy, to=bias.shape)]


def norm_of_sum(norm: str, with_sum: bool):
    """Of one of the two above; with the sum for a second value, or without."""
    name = f"{norm}_of_sum"

    def family(kernels: Kernels, x, residual, weight, *rest):
        inputs, bias = (x, residual, weight, *rest), rest[:-1]
        statistics = [(rows_of(x),)] * (1 + len(bias))
        y, *found, total = kernels.compute(name, *inputs, to=[x.shape, *statistics, x.shape])
        np.testing.assert_array_equal(total, x + residual)
        keep(kernels, name, inputs, [y, *found, total], [total])
        kept = keep(kernels, name, inputs, [y, *found], [total])
        dy, *dsum = cotangent((2, *x.shape)) if with_sum else (cotangent(x.shape),)
        dx = kernels.one(f"{norm}_grad", total, weight, *found, dy, *dsum, to=x.shape)
        dweight = kernels.one(f"{norm}_grad_weight", total, *found, dy, to=weight.shape)
        if np.isfinite(total).all():
            places = [*enumerate((weight, *found, dy, *dsum), 1)]
            same_gradients(kernels, f"{norm}_grad", kept, places, [x.shape])
            places = [*enumerate((*found, dy), 1)]
            same_gradients(kernels, f"{norm}_grad_weight", kept, places, [weight.shape])
        dbias = [kernels.one("sum_rows", dy, to=one.shape) for one in bias]
        return [np.stack((y, total)) if with_sum else y, dx, dx, dweight, *dbias]

    return family


def scale_columns(kernels: Kernels, x, factors):
    dy = cotangent(x.shape)
    return [
        kernels.one("scale_columns", x, factors, to=x.shape),
        kernels.one("scale_columns", dy, factors, to=x.shape),
        kernels.one("scale_columns_grad", x, dy, to=factors.shape),
    ]


def activation(name: str):
    def family(kernels: Kernels, x):
        y, dy = kernels.one(name, x, to=x.shape), cotangent(x.shape)
        kept = keep(kernels, name, (x,), [y], [x])
        if np.isfinite(x).all():
            same_gradients(kernels, f"{name}_grad", kept, [(1, dy)], [x.shape])
        return [y, kernels.one(f"{name}_grad", x, dy, to=x.shape)]

    return family


def gate(name: str):
    def family(kernels: Kernels, x, up):
        dy = cotangent(x.shape)
        gradients = kernels.compute(f"{name}_gate_grad", x, up, dy, to=[x.shape, x.shape])
        y = kernels.one(f"{name}_gate", x, up, to=x.shape)
        kept = keep(kernels, f"{name}_gate", (x, up), [y], [x, up])
        if np.isfinite(x).all() and np.isfinite(up).all():
            same_gradients(kernels, f"{name}_gate_grad", kept, [(2, dy)], [x.shape, x.shape])
        return [y, *gradients]

    return family


def split_heads(kernels: Kernels, x, heads):
    apart = _apart(x, heads)
    return [
        kernels.one("split_heads", x, to=apart),
        kernels.one("merge_heads", cotangent(apart), to=x.shape),
    ]


def merge_heads(kernels: Kernels, x):
    batch, heads, length, size = x.shape
    joined = (batch, length, heads * size)
    return [
        kernels.one("merge_heads", x, to=joined),
        kernels.one("split_heads", cotangent(joined), to=x.shape),
    ]


def rotary(name: str):
    def family(kernels: Kernels, x, cos, sin, heads):
        apart = _apart(x, heads)
        return [
            kernels.one(name, x, cos, sin, to=apart),
            kernels.one(f"{name}_grad", cotangent(apart), cos, sin, to=x.shape),
        ]

    return family


def _apart(x, heads) -> Shape:
    return x.shape[0], int(heads), x.shape[1], x.shape[2] // int(heads)


def loss(kernels: Kernels, hidden, weight, labels):
    inputs = (hidden, weight, labels)
    value, dhidden = kernels.compute("projected_cross_entropy", *inputs, to=[(1,), hidden.shape])
    dweight = kernels.one("projected_cross_entropy_grad_weight", *inputs, to=weight.shape)
    return [value, *(gradient * cotangent((1,)) for gradient in (dhidden, dweight))]


def embedding(kernels: Kernels, weight, ids):
    rows = kernels.one("embedding", ids, weight, to=(*ids.shape, weight.shape[1]))
    return [rows, kernels.one("embedding_grad", ids, weight, cotangent(rows.shape), to=weight.shape)]


def cached_attention(kernels: Kernels, q, k, v, mask, settings, keys, values, place):
    """What tokens see in the caches, and the caches afterwards; ``place`` is None for the first tokens."""
    keys, values = keys.copy(), values.copy()
    name = "attention_beginning_cache" if place is None else "attention_with_cache"
    out = np.empty((q.shape[0], q.shape[2], q.shape[1] * v.shape[-1]), np.float32)
    rest = [] if place is None else [place]
    kernels.call(name, q, k, v, mask, settings, SILENCE, keys, values, *rest, out)
    return [out, keys, values]


def adamw(kernels: Kernels, *tensors):
    """Gradients, parameters, both moments, scalars, settings, loss -> what has changed, norm and factor."""
    count = (len(tensors) - 7) // 2
    changed = [value.copy() for value in tensors[count : 2 * count + 2]]
    results = np.zeros(1, np.float32), np.zeros(1, np.float32)
    kernels.call("adamw", *tensors[:count], *changed, *tensors[2 * count + 2 :], *results)
    return [*changed, *results]


def adalora_penalty(kernels: Kernels, *tensors):
    """As and Bs in turn, settings -> the penalty and all gradients."""
    shapes = [factor.shape for factor in tensors[:-1]]
    penalty = kernels.one("adalora_penalty", *tensors, to=(1,))
    return [penalty, *kernels.compute("adalora_penalty_grad", *tensors, cotangent((1,)), to=shapes)]


def adalora_prune(kernels: Kernels, *tensors):
    """The kernel's inputs -> the parameters and what is kept of them."""
    count = (len(tensors) - 8) // 2
    changed = [value.copy() for value in tensors[count : 2 * count + 3]]
    norm = np.zeros(1, np.float32)
    kernels.call("adalora_prune", *tensors[:count], *changed, *tensors[2 * count + 3 :], norm)
    np.testing.assert_array_equal(norm, tensors[-3])
    return changed


_by_name = (
    linear,
    lora,
    lora_bias,
    lora_turned,
    lora_turned_bias,
    attention,
    masked_attention,
    rms_norm,
    layer_norm,
    loss,
)
FAMILIES = {
    "linear_bias": linear,
    **{name: partial(linear, turned=True) for name in ("linear_turned", "linear_turned_bias")},
    **{
        family.__name__: family
        for family in (*_by_name, rms_norm, layer_norm, loss, split_heads, merge_heads, embedding)
    },
    **{
        family.__name__: family
        for family in (cached_attention, adamw, adalora_penalty, adalora_prune, scale_columns)
    },
    **{family.__name__: family for family in (int8_linear, int8_linear_bias, kron_linear)},
    **dict.fromkeys(("delta_linear", "delta_linear_bias"), delta_linear),
    **dict.fromkeys(("sparse_delta_linear", "sparse_delta_linear_bias"), sparse_delta_linear),
    **{f"{name}_of_sum": norm_of_sum(name, False) for name in ("rms_norm", "layer_norm")},
    **{f"{name}_and_sum": norm_of_sum(name, True) for name in ("rms_norm", "layer_norm")},
    "described_attention": masked_attention,
    **{family.__name__: family for family in (lora_with_dropout, attention_with_dropout)},
    **{name: activation(name) for name in ACTIVATIONS},
    **{f"{name}_gate": gate(name) for name in ACTIVATIONS},
    **{name: rotary(name) for name in ("split_and_turn", "split_and_turn_neighbours")},
}
