from __future__ import annotations

import mindspore as ms
import numpy as np
import pytest
import torch
from mindspore import Parameter, ParameterTuple, Tensor, nn, ops
from transformers import get_scheduler

from mindpeft.errors import InputError
from mindpeft.train.optim import AdamW, undecayed_names
from mindpeft.train.schedules import get_schedule
from mindpeft.train.step import EvalStep, TrainStep
from tests.train.small import SmallClassifier, TorchTwin, make_batches

COLUMNS = ("input_ids", "labels")
STEPS, WARMUP, PEAK, DECAY, CLIP = 30, 5, 2e-2, 0.1, 0.6


def train_here(accumulation: int, max_norm: float, batches, mode=ms.GRAPH_MODE):
    ms.set_context(mode=mode)
    model = SmallClassifier()
    optimizer = AdamW(model, weight_decay=DECAY)
    step = TrainStep(model, COLUMNS, optimizer, accumulation, max_norm).set_train(True)
    schedule = get_schedule("linear", WARMUP, STEPS)
    losses, norms = [], []
    for i, batch in enumerate(batches):
        done = i // accumulation
        loss, norm = step(
            Tensor((i + 1) % accumulation == 0),
            Tensor(1 / accumulation, ms.float32),
            *optimizer.scalars(done + 1, PEAK * schedule(done)),
            *(Tensor(batch[name]) for name in COLUMNS),
        )
        losses.append(float(loss.asnumpy()))
        norms.append(float(norm.asnumpy()))
    ms.set_context(mode=ms.GRAPH_MODE)
    return model, step, losses, norms


def train_torch(accumulation: int, max_norm: float, batches):
    model = TorchTwin()
    plain = [p for n, p in model.named_parameters() if n.endswith("bias") or n.startswith("norm")]
    decayed = [p for n, p in model.named_parameters() if not (n.endswith("bias") or n.startswith("norm"))]
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": DECAY}, {"params": plain, "weight_decay": 0.0}], lr=PEAK
    )
    schedule = get_scheduler("linear", optimizer, WARMUP, STEPS)
    losses, norms = [], []
    for i, batch in enumerate(batches):
        loss = model(torch.tensor(batch["input_ids"]).long(), torch.tensor(batch["labels"]).long())
        (loss / accumulation).backward()
        losses.append(loss.item())
        if (i + 1) % accumulation == 0:
            norms.append(torch.nn.utils.clip_grad_norm_(model.parameters(), max_norm).item())
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
    return model, losses, norms


@pytest.mark.parametrize("accumulation", [1, 3])
def test_thirty_updates_equal_torch(accumulation):
    batches = make_batches(STEPS * accumulation)
    model, step, losses, norms = train_here(accumulation, CLIP, batches)
    twin, torch_losses, torch_norms = train_torch(accumulation, CLIP, batches)
    assert max(torch_norms) > CLIP > min(torch_norms)  # clipping is at work, and not always
    np.testing.assert_allclose(losses, torch_losses, atol=1e-5)
    np.testing.assert_allclose([n for n in norms if n], torch_norms, rtol=1e-4)
    for name in ("hidden.weight", "hidden.bias", "head.weight", "head.bias"):
        here = dict(model.parameters_and_names())[name].asnumpy()
        np.testing.assert_allclose(here, twin.get_parameter(name).detach().numpy(), atol=1e-5)
    np.testing.assert_allclose(model.norm.gamma.asnumpy(), twin.norm.weight.detach().numpy(), atol=1e-5)
    assert len(step.compile_cache) == 1  # thirty learning rates, one graph


def test_pynative_equals_graph():
    batches = make_batches(8)
    _, _, graph, _ = train_here(2, 1.0, batches)
    _, _, eager, _ = train_here(2, 1.0, batches, ms.PYNATIVE_MODE)
    np.testing.assert_allclose(graph, eager, atol=1e-5)


def test_one_graph_per_shape():
    batches = make_batches(3) + make_batches(2, length=7) + make_batches(1)
    _, step, _, _ = train_here(1, 1.0, batches)
    assert len(step.compile_cache) == 2


def test_frozen_weights_have_no_state_and_stay():
    model, step, _, _ = train_here(1, 1.0, make_batches(2))
    assert model.table.name not in {name.split(".", 1)[1] for name in step.optimizer.state_dict()}
    assert sum(step.optimizer.sizes) == sum(p.size for p in model.trainable_params())
    np.testing.assert_array_equal(model.table.asnumpy(), SmallClassifier().table.asnumpy())
    assert not [p.name for p in model.get_parameters() if p.name.startswith("model.")]  # names untouched


def test_a_gradient_that_is_not_finite_changes_nothing():
    model = SmallClassifier()
    model.head.weight.set_data(Tensor(np.full(model.head.weight.shape, np.inf, np.float32)))
    before = model.hidden.weight.asnumpy().copy()
    optimizer = AdamW(model)
    step = TrainStep(model, COLUMNS, optimizer).set_train(True)
    batch = make_batches(1)[0]
    scalars = optimizer.scalars(1, 0.1)
    loss, norm = step(Tensor(True), Tensor(1.0, ms.float32), *scalars, *(Tensor(batch[n]) for n in COLUMNS))
    assert not np.isfinite(norm.asnumpy())
    assert not np.isfinite(loss.asnumpy())
    np.testing.assert_array_equal(model.hidden.weight.asnumpy(), before)
    assert not optimizer.exp_avg.asnumpy().any()


def test_decay_leaves_norms_and_biases_alone():
    assert undecayed_names(SmallClassifier()) == {"norm.gamma", "norm.beta", "hidden.bias", "head.bias"}


def test_optimizer_state_round_trip_and_refusals():
    _, step, _, _ = train_here(1, 1.0, make_batches(2))
    state = step.optimizer.state_dict()
    fresh = AdamW(SmallClassifier())
    fresh.load_state_dict(state)
    np.testing.assert_array_equal(fresh.exp_avg_sq.asnumpy(), step.optimizer.exp_avg_sq.asnumpy())
    with pytest.raises(InputError, match=r"exp_avg.head.bias"):
        fresh.load_state_dict({k: v for k, v in state.items() if k != "exp_avg.head.bias"})
    model = SmallClassifier()
    for parameter in model.get_parameters():
        parameter.requires_grad = False
    with pytest.raises(InputError, match="nothing to train"):
        AdamW(model)


def test_eval_step_gives_loss_and_logits_and_refuses_unknown_columns():
    model = SmallClassifier()
    batch = make_batches(1)[0]
    loss, logits = EvalStep(model, COLUMNS).set_train(False)(*(Tensor(batch[n]) for n in COLUMNS))
    assert loss.shape == ()
    alone = EvalStep(model, ("input_ids",)).set_train(False)(Tensor(batch["input_ids"]))
    np.testing.assert_allclose(alone.asnumpy(), logits.asnumpy(), atol=1e-6)
    with pytest.raises(InputError, match="did you mean 'labels'"):
        EvalStep(model, ("input_ids", "label"))


class ManyParameters(nn.Cell):
    """A loss over many small weights, none of them deep in the graph."""

    def __init__(self, count: int):
        super().__init__()
        weights = [Parameter(Tensor(np.full(2, index, np.float32)), f"w{index}") for index in range(count)]
        self.weights = ParameterTuple(weights)
        self.flat = ops.HyperMap()

    def construct(self, x):
        total = ops.cat(self.flat(_times_two, self.weights)).sum() * x.sum()
        return total, x


def _times_two(weight):
    return weight * 2.0


@pytest.mark.slow
def test_more_parameters_than_nested_calls_are_allowed_by_default():
    """MindSpore nests a call for each parameter in a loop, and refuses more than 1,000 unless told."""
    ms.set_context(mode=ms.GRAPH_MODE)
    model = ManyParameters(160).set_train()
    optimizer = AdamW(model)
    before = [parameter.asnumpy().copy() for parameter in optimizer.parameters]
    step = TrainStep(model, ("x",), optimizer)
    step(Tensor(True), Tensor(1.0, ms.float32), *optimizer.scalars(1, 1e-2), Tensor(np.ones(2, np.float32)))
    for parameter, value in zip(optimizer.parameters, before, strict=True):
        np.testing.assert_allclose(parameter.asnumpy(), value - 1e-2, atol=1e-5)
