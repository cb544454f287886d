"""Diff pruning against the same formulas in torch, with the same noise on both sides."""

from __future__ import annotations

import json

import mindspore as ms
import numpy as np
import pytest
import torch
from mindspore import Tensor, nn
from safetensors.numpy import load_file

from mindpeft import DiffPruningConfig, PeftModel, get_peft_model
from mindpeft.errors import InputError
from mindpeft.nn import Embedding, LayerNorm
from mindpeft.train.optim import AdamW
from mindpeft.train.runner import StepRunner
from mindpeft.tuners.diff_pruning_layers import DiffLayer
from tests.tuners.oracle import LABELS

pytestmark = pytest.mark.usefixtures("graph_mode")

TARGETS = ["query", "c_attn", "kinds", "LayerNorm", "intermediate"]
GAMMA, ZETA, L0 = -1.4, 1.3, 1e-3


class Fixed(nn.Cell):
    """The same noise in every step, different for each shape."""

    def __init__(self):
        super().__init__(auto_prefix=False)

    def construct(self, shape):
        return Tensor(noise_of(shape))


def noise_of(shape):
    u = np.random.default_rng(sum(shape) + len(shape)).uniform(0.05, 0.95, shape)
    return (np.log(u) - np.log(1 - u)).astype(np.float32)


def ours_with_noise(twins, **options):
    config = {"target_modules": TARGETS, "gamma": GAMMA, "zeta": ZETA, "temperature": 0.7, "l0_weight": L0}
    model = get_peft_model(twins.make_model(), DiffPruningConfig(**{**config, "alpha_init": 0.3, **options}))
    for _, cell in model.cells_and_names():
        if isinstance(cell, DiffLayer):
            cell.noise = Fixed()
    random = np.random.default_rng(2)
    for parameter in model.trainable_params():
        start = random.normal(0, 0.3, parameter.shape).astype(np.float32)
        parameter.set_data(Tensor(parameter.asnumpy() + start))
    return model


class Oracle:
    """W + z w in torch for every parameter that the adapter has, by functional calls."""

    def __init__(self, twins, model, structured):
        self.twin, self.structured = twins.make_torch(), structured
        values = {
            p.name: p.asnumpy()
            for p in model.get_parameters()
            if ".diff_" in p.name or p.name.startswith("diff_")
        }
        self.parameters = {k: torch.tensor(v, requires_grad=True) for k, v in values.items()}
        self.names = [name for name in values if f"{name}_alpha" in values]

    def gate(self, alpha, noisy):
        logits = alpha + torch.tensor(noise_of(tuple(alpha.shape))) if noisy else alpha
        return torch.clamp(torch.sigmoid(logits / 0.7) * (ZETA - GAMMA) + GAMMA, 0, 1)

    def logits(self, ids, noisy):
        state = dict(self.twin.named_parameters())
        for name in self.names:
            z = self.gate(self.parameters[f"{name}_alpha"], noisy)
            if self.structured:
                z = z * self.gate(self.parameters[f"{name}_group"], noisy)
            path = name.replace("diff_", "")
            state[path] = state[path] + z * self.parameters[name]
        return torch.func.functional_call(self.twin, state, torch.tensor(ids))

    def loss(self, ids):
        shift = 0.7 * np.log(-GAMMA / ZETA)
        term = 0.0
        for name in self.names:
            opened = torch.sigmoid(self.parameters[f"{name}_alpha"] - shift).sum()
            if self.structured:
                opened = opened * torch.sigmoid(self.parameters[f"{name}_group"] - shift).squeeze()
            term = term + opened
        task = torch.nn.functional.cross_entropy(self.logits(ids, True), torch.tensor(LABELS).long())
        return task + L0 * term


@pytest.mark.slow
@pytest.mark.parametrize("structured", [False, True])
def test_training_equals_the_formulas(twins, structured):
    model = ours_with_noise(twins, structured=structured)
    oracle = Oracle(twins, model, structured)
    np.testing.assert_allclose(
        twins.logits(model.set_train(False)), oracle.logits(twins.IDS, False).detach().numpy(), atol=1e-5
    )
    trained = [v for k, v in oracle.parameters.items() if structured or not k.endswith("_group")]
    assert sum(v.numel() for v in trained) == model.get_nb_trainable_parameters()[0]
    optimizer = torch.optim.AdamW(trained, lr=2e-2, weight_decay=0.0)
    runner = StepRunner(model, AdamW(model), max_grad_norm=0.0)
    batch = {"input_ids": twins.IDS, "labels": LABELS}
    losses, expected = [], []
    for step in range(1, 13):
        optimizer.zero_grad()
        loss = oracle.loss(twins.IDS)
        loss.backward()
        optimizer.step()
        expected.append(loss.item())
        losses.append(runner.train(batch, step, 2e-2)[0])
    np.testing.assert_allclose(losses, expected, atol=2e-4)
    assert expected[-1] < expected[0] - 0.1
    assert runner.cached_graphs == 1


@pytest.mark.slow
def test_pruning_files_merging_and_switching(twins, tmp_path):
    base = twins.logits(twins.make_model())
    model = ours_with_noise(twins, prune_step=3, target_fraction=0.05)
    runner = StepRunner(model, AdamW(model), max_grad_norm=0.0)
    batch = {"input_ids": twins.IDS, "labels": LABELS}
    losses = [runner.train(batch, step, 1e-2)[0] for step in range(1, 7)]
    assert np.isfinite(losses).all()
    assert runner.cached_graphs == 1
    model.set_train(False)
    adapted = twins.logits(model)
    assert np.abs(adapted - base).max() > 1e-3
    total = sum(
        p.size for p in model.get_parameters() if p.name.rpartition(".")[2] in ("diff_weight", "diff_bias")
    )

    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    kept = sum(value.size for name, value in tensors.items() if name.endswith(".values"))
    assert kept == round(0.05 * total)
    assert {str(v.dtype) for k, v in tensors.items() if k.endswith("indices")} == {"int32"}
    assert sum(json.loads((tmp_path / "adapter_config.json").read_text())["kept"].values()) == kept

    again = PeftModel.from_pretrained(twins.make_model(), tmp_path, is_trainable=True).set_train(False)
    np.testing.assert_allclose(twins.logits(again), adapted, atol=1e-6)
    assert again.get_nb_trainable_parameters()[0] == kept
    # What is left is trained on; nothing else is.
    more = StepRunner(again, AdamW(again), max_grad_norm=0.0)
    assert not more.hooks
    more.train(batch, 1, 1e-2)
    again.set_train(False)
    assert np.abs(twins.logits(again) - adapted).max() > 1e-4
    again.save_pretrained(tmp_path / "more")
    trained = load_file(tmp_path / "more" / "adapter_model.safetensors")
    for name, value in tensors.items():
        if name.endswith("indices"):
            np.testing.assert_array_equal(trained[name], value)

    for _ in range(20):
        model.merge_adapter()
        np.testing.assert_allclose(twins.logits(model), adapted, atol=1e-5)
        model.unmerge_adapter()
        np.testing.assert_array_equal(twins.logits(model), adapted)
    model.add_adapter(
        "two", DiffPruningConfig(target_modules=TARGETS, gamma=GAMMA, zeta=ZETA, temperature=0.7)
    )
    model.load_adapter(tmp_path / "more", "three")
    twins.logits(model)
    compiled = len(model.compile_cache)
    for name in ("two", "three", "default"):
        model.set_adapter(name)
        twins.logits(model)
    np.testing.assert_array_equal(twins.logits(model), adapted)
    with model.disable_adapter():
        np.testing.assert_array_equal(twins.logits(model), base)
    assert len(model.compile_cache) == compiled
    np.testing.assert_allclose(twins.logits(model.merge_and_unload()), adapted, atol=1e-5)


def test_noise_has_the_distribution_and_acts_while_training_only(twins):
    ms.set_context(mode=ms.PYNATIVE_MODE)
    model = get_peft_model(nn.SequentialCell(nn.Dense(200, 100)), DiffPruningConfig(target_modules=["0"]))
    layer = next(cell for _, cell in model.cells_and_names() if isinstance(cell, DiffLayer))
    noise = layer.noise((100, 200)).asnumpy()
    assert noise.mean() == pytest.approx(0, abs=0.05)
    assert noise.std() == pytest.approx(np.pi / np.sqrt(3), rel=0.02)  # the logistic distribution's
    alpha = Tensor(np.zeros((100, 200), np.float32))
    model.set_train(True)
    gates = layer.gate(alpha).asnumpy()
    # P(z = 0) = 1 - sigmoid(alpha - log(-gamma / zeta)), and z = 1 where the sigmoid is above 2.5 / 3.
    assert (gates == 0).mean() == pytest.approx(0.5, abs=0.02)
    assert (gates == 1).mean() == pytest.approx(0.5 / 3, abs=0.02)
    model.set_train(False)
    np.testing.assert_allclose(layer.gate(alpha).asnumpy(), 0.0 + 0.5 * 3.0 - 1.5, atol=1e-6)


def test_our_own_cells_and_half_precision():
    ms.set_context(mode=ms.PYNATIVE_MODE)
    norm, table = LayerNorm(4), Embedding(5, 4, padding_idx=0)
    norm.weight.set_data(Tensor(np.array([1, 2, 3, 4], np.float32)))
    cell = nn.SequentialCell(table, norm, nn.Dense(4, 3))
    model = get_peft_model(cell, DiffPruningConfig(target_modules=["0", "1", "2"]))
    random = np.random.default_rng(0)
    for parameter in model.trainable_params():
        if not parameter.name.endswith("alpha"):
            parameter.set_data(Tensor(random.normal(0, 1, parameter.shape).astype(np.float32)))
    ids = Tensor(np.array([[1, 0, 3]], np.int32))
    adapted = model(ids).asnumpy()
    np.testing.assert_allclose(model.merge_and_unload()(ids).asnumpy(), adapted, atol=1e-5)
    half = get_peft_model(
        nn.SequentialCell(nn.Dense(4, 3, dtype=ms.float16)), DiffPruningConfig(target_modules=["0"])
    )
    assert {str(p.dtype) for p in half.trainable_params()} == {"Float32"}
    assert half(Tensor(np.ones((2, 4), np.float16))).dtype == ms.float16


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"l0_weight": -1}, "l0_weight must not be negative"),
        ({"l0_weight": "a"}, "l0_weight must be a number"),
        ({"target_fraction": 0}, r"target_fraction must lie in \(0, 1\], not 0"),
        ({"target_fraction": 1.5}, "target_fraction must lie in"),
        ({"temperature": 0}, "temperature must be positive"),
        ({"gamma": 0.1}, "gamma must be below 0 and zeta above 1"),
        ({"zeta": 1.0}, "gamma must be below 0 and zeta above 1"),
        ({"prune_step": 0}, "prune_step must be a positive integer"),
        ({"target_modules": ["relu"]}, "diff pruning can't wrap the cell 'relu'"),
        ({"target_modules": ["batch"]}, "diff pruning can't wrap the cell 'batch'"),
    ],
)
def test_refuses(options, message):
    cell = nn.Cell()
    cell.dense, cell.relu, cell.batch = nn.Dense(2, 2), nn.ReLU(), nn.BatchNorm1d(2)
    with pytest.raises(InputError, match=message):
        get_peft_model(cell, DiffPruningConfig(**{"target_modules": ["dense"], **options}))
