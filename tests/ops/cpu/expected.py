"""What torch computes in float64 for each family of `native`, and how far ours is from it."""

from __future__ import annotations

import math

import numpy as np
import torch
import torch.nn.functional as F

from mindpeft.ops.causal_mask import alibi_slopes
from tests.ops.compare import run_torch
from tests.ops.cpu.cases import LOWEST, Case
from tests.ops.cpu.native import Kernels


def error(found: list[np.ndarray], expected: list[np.ndarray]) -> float:
    """The largest difference, relative to the largest number of its array; infinite where NaNs differ."""
    assert [array.shape for array in found] == [array.shape for array in expected]
    # A gradient ten times smaller than the others is what is left of sums that cancel, such as that of scores
    # where there is one key.
    least = 0.1 * max(map(_largest, expected[1:]), default=0)
    bounds = [0, *(least for _ in expected[1:])]
    return max(map(_error, found, expected, bounds))


def _largest(array: np.ndarray) -> float:
    return float(np.abs(array[np.isfinite(array)]).max(initial=0))


def _error(found: np.ndarray, expected: np.ndarray, least: float) -> float:
    finite = np.isfinite(expected)
    # NaN where NaN is expected, and each infinity where it is
    if not np.array_equal(np.where(finite, 0, found), np.where(finite, 0, expected), equal_nan=True):
        return math.inf
    difference = np.abs(np.where(finite, found, 0) - np.where(finite, expected, 0))
    return float(difference.max(initial=0)) / max(_largest(expected), least, 1e-30)


def expectation(case: Case) -> list[np.ndarray]:
    """Value and gradients by torch."""
    fixed = [torch.as_tensor(value) for value in case.fixed]
    fixed = [value.double() if value.is_floating_point() else value.long() for value in fixed]
    return run_torch(lambda *tensors: FAMILIES[case.family](*tensors, *fixed), *case.inputs)


def worst(kernels: Kernels, cases: list[Case]) -> float:
    """The largest error of our kernels over cases; one beyond all bounds is reported with its shapes."""
    errors = [error(case.run(kernels), expectation(case)) for case in cases]
    at = int(np.argmax(errors))
    print(f"{errors[at]:.1e} at {cases[at]}")
    return errors[at]


def linear(x, weight, bias=None):
    return F.linear(x, weight, bias)


def delta_linear(x, weight, delta, bias=None):
    return F.linear(x, weight + delta, bias)


def sparse_delta_linear(x, weight, values, places):
    return F.linear(x, weight.index_put(tuple(places), values, accumulate=True))


def sparse_delta_linear_bias(x, weight, values, bias, places):
    return sparse_delta_linear(x, weight, values, places) + bias


def kron_linear(x, left, right):
    return F.linear(x, torch.kron(left, right))


def int8_linear(x, weight, scale):
    return F.linear(x, weight * scale[:, None])


def int8_linear_bias(x, bias, weight, scale):
    return int8_linear(x, weight, scale) + bias


def lora(x, weight, a, b, scale):
    return x @ weight.T + scale * x @ a.T @ b.T


def lora_bias(x, weight, a, b, bias, scale):
    return lora(x, weight, a, b, scale) + bias


def linear_turned(x, weight, bias=None):
    return F.linear(x, weight.T, bias)


def lora_turned(x, weight, a, b, scale):
    return lora(x, weight.T, a, b, scale)


def lora_turned_bias(x, weight, a, b, bias, scale):
    return lora_bias(x, weight.T, a, b, bias, scale)


def attention(q, k, v, settings):
    return masked_attention(q, k, v, torch.zeros((), dtype=torch.float64), settings)


def masked_attention(q, k, v, mask, settings):
    scale, cap = settings.tolist()
    group = q.shape[1] // k.shape[1]
    scores = q @ k.repeat_interleave(group, 1).mT * scale
    if cap > 0:
        scores = cap * torch.tanh(scores / cap)
    mixed = torch.softmax(scores + mask, -1) @ v.repeat_interleave(group, 1)
    return mixed.transpose(1, 2).flatten(2)


def described_attention(q, k, v, rules, settings):
    mask = pairs(rules.numpy(), q.shape[1], q.shape[2], k.shape[2])
    return masked_attention(q, k, v, torch.tensor(mask, dtype=torch.float64), settings)


def pairs(rules: np.ndarray, heads: int, length: int, keys: int) -> np.ndarray:
    """What `mindpeft.ops.cpu.attention.MaskRules` add to scores, (1 or batch, heads, length, keys)."""
    if len(rules) == 0:
        return np.zeros((0, heads, length, keys))
    causal, first, window, alibi, past = (int(number) for number in rules[0, :5])
    own, queries = np.arange(keys - past), first + np.arange(length)
    samples = rules[:, 5:] if rules.shape[1] > 5 else np.ones((1, len(own)))
    seen = np.broadcast_to(samples[:, None] != 0, (len(samples), length, len(own)))
    if causal:
        distance, mine = queries[:, None] - own, samples[:, queries, None]
        near = (distance >= 0) & (distance < (window or keys))
        seen = seen & near & ((mine == 0) | (mine == samples[:, None]))
    mask = np.where(seen, 0, LOWEST)[:, None].repeat(heads, 1)
    if alibi:
        real = samples != 0
        places = (np.cumsum(real, 1) - 1) * real
        mask = mask + np.array(alibi_slopes(heads))[:, None, None] * places[:, None, None]
    return np.concatenate((np.zeros((*mask.shape[:3], past)), mask), -1)


def rms_norm(x, weight, eps):
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * weight


def layer_norm(x, weight, bias, eps):
    return F.layer_norm(x, weight.shape, weight, bias, eps.item())


def norm_of_sum(norm, with_sum):
    def family(x, residual, *rest):
        total = x + residual
        y = norm(total, *rest)
        return torch.stack((y, total)) if with_sum else y

    return family


def scale_columns(x, factors):
    return x * factors


ACTIVATIONS = {
    "gelu": F.gelu,
    "tanh_gelu": lambda x: F.gelu(x, approximate="tanh"),
    "silu": F.silu,
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
    "sigmoid": torch.sigmoid,
}


def gate(function):
    return lambda x, up: function(x) * up


def split_heads(x, heads):
    return x.unflatten(-1, (int(heads), -1)).transpose(1, 2)


def merge_heads(x):
    return x.transpose(1, 2).flatten(2)


def split_and_turn(x, cos, sin, heads):
    size = cos.shape[-1]
    return _turned(x, cos, sin, heads, lambda turned: turned.roll(size // 2, -1))


def split_and_turn_neighbours(x, cos, sin, heads):
    return _turned(x, cos, sin, heads, lambda turned: turned.unflatten(-1, (-1, 2)).flip(-1).flatten(-2))


def _turned(x, cos, sin, heads, exchanged):
    apart, size = split_heads(x, heads), cos.shape[-1]
    turned = apart[..., :size]
    return torch.cat((turned * cos[:, :1] + exchanged(turned) * sin[:, :1], apart[..., size:]), -1)


def loss(hidden, weight, labels):
    counted = labels >= 0
    # torch's mean over no label at all is NaN, ours 0
    total = F.cross_entropy(hidden[counted] @ weight.T, labels[counted], reduction="sum")
    return (total / max(1, counted.sum())).reshape(1)


def embedding(weight, ids):
    return F.embedding(ids, weight)


_by_name = (linear, lora, lora_bias, attention, masked_attention, described_attention, rms_norm, layer_norm)
_by_name = (*_by_name, loss, split_heads, merge_heads, split_and_turn, split_and_turn_neighbours, embedding)
_by_name = (*_by_name, scale_columns, int8_linear, int8_linear_bias)
_by_name = (*_by_name, delta_linear, sparse_delta_linear, sparse_delta_linear_bias, kron_linear)
FAMILIES = {
    **{family.__name__: family for family in (*_by_name, linear_turned, lora_turned, lora_turned_bias)},
    "linear_bias": linear,
    "delta_linear_bias": delta_linear,
    "linear_turned_bias": linear_turned,
    **{f"{norm.__name__}_of_sum": norm_of_sum(norm, False) for norm in (rms_norm, layer_norm)},
    **{f"{norm.__name__}_and_sum": norm_of_sum(norm, True) for norm in (rms_norm, layer_norm)},
    **ACTIVATIONS,
    **{f"{name}_gate": gate(function) for name, function in ACTIVATIONS.items()},
}
