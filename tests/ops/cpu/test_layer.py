"""All kernels in one compiled graph: a decoder's layer and its loss, against the same in torch."""

from __future__ import annotations

import mindspore as ms
import mindspore.nn as nn
import numpy as np
import torch
from mindspore import Tensor

from mindpeft.ops.cpu.activations import ActivationKernel, GateKernel
from mindpeft.ops.cpu.attention import AttentionKernel, MaskedAttentionKernel
from mindpeft.ops.cpu.heads import MergeHeadsKernel, SplitAndTurnKernel, SplitHeadsKernel
from mindpeft.ops.cpu.linear import LinearBiasKernel, LinearKernel, LoraBiasKernel, LoraKernel
from mindpeft.ops.cpu.loss import ProjectedLossKernel
from mindpeft.ops.cpu.norms import (
    LayerNormKernel,
    LayerNormOfSumKernel,
    RmsNormKernel,
    RmsNormOfSumKernel,
)
from tests.ops.compare import run, run_torch
from tests.ops.cpu import expected as theirs
from tests.ops.cpu.cases import LOWEST, Random, numbers, tables
from tests.ops.cpu.native import SILENCE

HEADS, SIZE, LENGTH, RANK, VOCABULARY = 2, 6, 7, 3, 19
WIDTH = HEADS * SIZE
SETTINGS = numbers(0.4, 20)


class Layer(nn.Cell):
    """Every Cell of `mindpeft.ops.cpu` once, one behind the other."""

    def __init__(self, mask: np.ndarray, cos: np.ndarray, sin: np.ndarray, labels: np.ndarray):
        super().__init__()
        self.mask, self.cos, self.sin = Tensor(mask), Tensor(cos), Tensor(sin)
        self.labels, self.scale = Tensor(labels), Tensor(SETTINGS[:1])
        self.silence = Tensor(SILENCE)
        self.rms_norm, self.layer_norm = RmsNormKernel(1e-5), LayerNormKernel(1e-5)
        self.rms_norm_of_sum = RmsNormOfSumKernel(1e-5, with_sum=True)
        self.layer_norm_of_sum = LayerNormOfSumKernel(1e-5, with_sum=False)
        self.lora, self.lora_bias = LoraKernel(), LoraBiasKernel()
        self.linear, self.linear_bias = LinearKernel(), LinearBiasKernel()
        self.turn, self.turn_neighbours = SplitAndTurnKernel(HEADS, False), SplitAndTurnKernel(HEADS, True)
        self.split, self.merge = SplitHeadsKernel(HEADS), MergeHeadsKernel(HEADS)
        self.masked_attention = MaskedAttentionKernel(*SETTINGS.tolist())
        self.attention = AttentionKernel(*SETTINGS.tolist())
        self.activation, self.gate = ActivationKernel("gelu"), GateKernel("silu")
        self.loss = ProjectedLossKernel()

    def construct(self, x, weight, a, b, vector, vocabulary):
        x = self.rms_norm(x, vector)[0]
        q = self.turn(self.lora(x, weight, a, b, self.scale, self.silence)[0], self.cos, self.sin)
        k = self.turn_neighbours(
            self.lora_bias(x, weight, a, b, self.scale, self.silence, vector)[0], self.cos, self.sin
        )
        v = self.split(self.linear(x, weight))
        y, x = self.rms_norm_of_sum(x, self.masked_attention(q, k, v, self.mask, self.silence)[0], vector)
        x = self.layer_norm_of_sum(x, y, vector, vector)[0]
        x = self.layer_norm(x + self.attention(q, k, v, self.silence)[0] + self.merge(v), vector, vector)[0]
        x = self.gate(self.linear_bias(x, weight, vector), self.activation(x))
        return self.loss(x.reshape((-1, WIDTH)), vocabulary, self.labels)[0]


def in_torch(mask, cos, sin, labels):
    """The same of torch's operators."""
    mask, cos, sin, settings = (torch.tensor(value).double() for value in (mask, cos, sin, SETTINGS))
    labels, scale = torch.tensor(labels).long(), settings[:1]
    eps = torch.tensor(1e-5)

    def layer(x, weight, a, b, vector, vocabulary):
        x = theirs.rms_norm(x, vector, eps)
        q = theirs.split_and_turn(theirs.lora(x, weight, a, b, scale), cos, sin, HEADS)
        k = theirs.lora_bias(x, weight, a, b, vector, scale)
        k = theirs.split_and_turn_neighbours(k, cos, sin, HEADS)
        v = theirs.split_heads(theirs.linear(x, weight), HEADS)
        x = x + theirs.masked_attention(q, k, v, mask, settings)
        x = theirs.layer_norm(x + theirs.rms_norm(x, vector, eps), vector, vector, eps)
        x = x + theirs.attention(q, k, v, settings) + theirs.merge_heads(v)
        x = theirs.layer_norm(x, vector, vector, eps)
        x = theirs.FAMILIES["silu_gate"](theirs.linear(x, weight, vector), theirs.FAMILIES["gelu"](x))
        return theirs.loss(x.reshape(-1, WIDTH), vocabulary, labels)

    return layer


def test_one_graph_of_all_kernels():
    random = Random(0)
    mask = np.where(np.tri(LENGTH) > 0, 0, LOWEST).astype(np.float32)[None, None]
    cos, sin = tables(random, 1, 1, LENGTH, SIZE)
    labels = random.generator.integers(-3, VOCABULARY, 2 * LENGTH).astype(np.int32)
    shapes = [(2, LENGTH, WIDTH), (WIDTH, WIDTH), (RANK, WIDTH), (WIDTH, RANK), (WIDTH,), (VOCABULARY, WIDTH)]
    inputs = [random.normal(*shape, scale=0.7) for shape in shapes]
    ms.set_context(mode=ms.GRAPH_MODE)
    found = run(Layer(mask, cos, sin, labels), *inputs)
    assert theirs.error(found, run_torch(in_torch(mask, cos, sin, labels), *inputs)) < 1e-5
