"""What a method adds to every training step: a term of the loss, a rule after the update, kept state."""

from __future__ import annotations

import mindspore as ms
import numpy as np
import pytest
from mindspore import Parameter, Tensor, ops

from mindpeft.errors import InputError
from mindpeft.ops.cpu import kernels_on
from mindpeft.train.callbacks import TrainerState
from mindpeft.train.checkpoints import load_checkpoint, save_checkpoint
from mindpeft.train.optim import AdamW
from mindpeft.train.runner import StepRunner
from mindpeft.tuners.hooks import TrainingHook
from tests.train.small import SmallClassifier, make_batches

RATE = 1e-2


class Remembering(TrainingHook):
    """Pulls the head's bias to 1, and remembers the last gradient, value and step."""

    def __init__(self, bias):
        super().__init__([bias])
        self.bias = bias
        self.gradient, self.value = (
            Parameter(Tensor(np.zeros(bias.shape, np.float32)), name=name, requires_grad=False)
            for name in ("remembered_gradient", "remembered_value")
        )
        self.steps = Parameter(Tensor(np.zeros(3, np.int32)), name="steps", requires_grad=False)

    def penalty(self):
        return ops.sum((self.bias - 1.0) ** 2) * 0.5

    def after_update(self, values, gradients, step):
        ops.assign(self.gradient, gradients[0])
        ops.assign(self.value, values[0])
        ops.assign(self.steps, ops.cat((self.steps[1:], ops.reshape(step, (1,)))))

    def state(self):
        return {"steps": self.steps}


class Hooked(SmallClassifier):
    def training_hooks(self):
        return [Remembering(self.head.bias)]


def train(model, accumulation=1, clip=0.0, steps=3, mode=ms.GRAPH_MODE):
    ms.set_context(mode=mode)
    runner = StepRunner(model, AdamW(model), accumulation, clip)
    batches, losses = make_batches(steps * accumulation), []
    for i, batch in enumerate(batches):
        last = (i + 1) % accumulation == 0
        losses.append(runner.train(batch, i // accumulation + 1, RATE, last, 1 / accumulation)[0])
    ms.set_context(mode=ms.GRAPH_MODE)
    return runner, losses


@pytest.mark.parametrize(
    ("accumulation", "mode"),
    [
        pytest.param(1, ms.GRAPH_MODE, marks=pytest.mark.slow),
        (2, ms.GRAPH_MODE),
        (2, ms.PYNATIVE_MODE),
    ],
)
def test_penalty_gradient_and_update_are_seen(accumulation, mode):
    plain, hooked = SmallClassifier(), Hooked()
    _, without = train(plain, accumulation, steps=1)
    runner, losses = train(hooked, accumulation, steps=1, mode=mode)
    bias = SmallClassifier().head.bias.asnumpy()
    term = 0.5 * ((bias - 1) ** 2).sum()
    np.testing.assert_allclose(losses, np.array(without) + term, atol=1e-5)
    # The gradient is the plain one and the term's; what AdamW keeps of the first one is a tenth of it.
    hook, moments = runner.hooks[0], runner.optimizer.state_dict()
    np.testing.assert_allclose(hook.gradient.asnumpy(), moments["exp_avg.head.bias"] * 10, atol=1e-5)
    np.testing.assert_array_equal(hook.value.asnumpy(), hooked.head.bias.asnumpy())
    assert (hook.value.asnumpy() != bias).all()
    assert hook.steps.asnumpy().tolist() == [0, 0, 1]
    batch = make_batches(1)[0]
    same = SmallClassifier()
    expected = StepRunner(same).evaluate(batch)[0]
    assert StepRunner(Hooked()).evaluate(batch)[0] == pytest.approx(expected, abs=1e-6)


def test_the_gradient_is_the_clipped_one_and_one_graph_is_enough():
    runner, _ = train(Hooked(), clip=1e-3, steps=4)
    assert 0 < np.abs(runner.hooks[0].gradient.asnumpy()).max() <= 1e-3
    assert runner.hooks[0].steps.asnumpy().tolist() == [2, 3, 4]
    assert runner.cached_graphs == 1


class Pulling(TrainingHook):
    """Pulls the head's bias to 0 by a term whose gradient needs nothing of its value."""

    def __init__(self, bias):
        super().__init__([])
        self.bias = bias

    def penalty(self):
        return ops.sum(ops.abs(self.bias)) * 0.5


@pytest.mark.parametrize("clip", [0.0, 0.1])
def test_a_term_alone_goes_with_the_optimizers_kernel(monkeypatch, clip):
    def trained():
        model = SmallClassifier()
        model.training_hooks = lambda: [Pulling(model.head.bias)]
        runner, losses = train(model, clip=clip, steps=5)
        values = [parameter.asnumpy() for parameter in model.trainable_params()]
        return runner._train_step.kernel, [losses, *values, *runner.optimizer.state_dict().values()]

    kernel, found = trained()
    assert (kernel is None) != kernels_on()
    monkeypatch.setattr("mindpeft.train.step.kernels_on", lambda: False)
    kernel, expected = trained()
    assert kernel is None
    for one, two in zip(found, expected, strict=True):
        np.testing.assert_allclose(one, two, rtol=1e-5, atol=1e-6)


def test_an_update_that_is_left_out_calls_nothing():
    model = Hooked()
    model.head.weight.set_data(Tensor(np.full(model.head.weight.shape, np.inf, np.float32)))
    runner, _ = train(model, steps=1)
    assert not runner.hooks[0].steps.asnumpy().any()


def test_checkpoints_keep_the_state(tmp_path):
    model = Hooked()
    runner, _ = train(model, steps=3)
    save_checkpoint(tmp_path, model, runner.optimizer, TrainerState(), runner.hooks)
    other = Hooked()
    fresh = StepRunner(other, AdamW(other))
    load_checkpoint(tmp_path, fresh.optimizer, fresh.hooks)
    assert fresh.hooks[0].steps.asnumpy().tolist() == [1, 2, 3]
    np.testing.assert_array_equal(other.head.bias.asnumpy(), model.head.bias.asnumpy())
    plain = SmallClassifier()
    with pytest.raises(InputError, match="a checkpoint of another method"):
        load_checkpoint(tmp_path, AdamW(plain))
