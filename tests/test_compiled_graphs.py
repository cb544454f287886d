"""What is compiled anew, and what is not: switching, growing slots, functions of ``mindspore.jit``."""

from __future__ import annotations

import mindspore as ms
import numpy as np
import pytest
from mindspore import Tensor, nn

from mindpeft import get_peft_model
from tests.random_lora import config, graphs

pytestmark = pytest.mark.usefixtures("graph_mode")


class Step(nn.Cell):
    """A cell around the model, as a training step is."""

    def __init__(self, model):
        super().__init__(auto_prefix=False)
        self.model = model

    def construct(self, ids):
        return self.model(ids).sum(), self.model(ids)


def test_switching_compiles_nothing_and_is_exact(twins, three):
    step, names = Step(three), ["four", "eight", "sixteen"]
    ids = Tensor(twins.IDS)
    expected = {}
    for name in names:
        three.set_adapter(name)
        expected[name] = twins.logits(three), step(ids)[1].asnumpy()
    assert not np.allclose(expected["four"][0], expected["eight"][0], atol=1e-3)
    assert not np.allclose(expected["eight"][0], expected["sixteen"][0], atol=1e-3)
    before = graphs(three, step, three.base_model)
    assert before == 2
    order = np.random.default_rng(0).integers(0, 3, 100)
    for index in order:
        name = names[index]
        three.set_adapter(name)
        np.testing.assert_array_equal(twins.logits(three), expected[name][0])
        np.testing.assert_array_equal(step(ids)[1].asnumpy(), expected[name][1])
    assert graphs(three, step, three.base_model) == before


def test_a_compiled_graph_is_not_stale_after_a_slot_grew(twins):
    model = get_peft_model(twins.make_model(), config(r=2))
    step, ids = Step(model), Tensor(twins.IDS)
    small = twins.logits(model), step(ids)[1].asnumpy()
    model.add_adapter("large", config(r=9))
    np.testing.assert_allclose(twins.logits(model), small[0], atol=1e-6)
    model.set_adapter("large")
    large = twins.logits(model), step(ids)[1].asnumpy()
    assert np.abs(large[0] - small[0]).max() > 1e-3
    np.testing.assert_allclose(large[1], large[0], atol=1e-6)
    ms.set_context(mode=ms.PYNATIVE_MODE)
    np.testing.assert_allclose(twins.logits(model), large[0], atol=1e-5)


def test_jit_functions_see_every_change(twins):
    model = get_peft_model(twins.make_model(), config(r=2))
    model.add_adapter("same", config(r=2))

    @ms.jit
    def run(ids):
        return model(ids)

    ids = Tensor(twins.IDS)
    for name, options in (
        ("default", None),
        ("same", None),
        ("large", {"r": 9}),
        ("wide", {"target_modules": ["dense"]}),
    ):
        if options:
            model.add_adapter(name, config(**options))
        model.set_adapter(name)
        np.testing.assert_allclose(run(ids).asnumpy(), twins.logits(model), atol=1e-6)
    model.set_adapter("default")
    np.testing.assert_allclose(run(ids).asnumpy(), twins.logits(model), atol=1e-6)
    model.merge_adapter()
    np.testing.assert_allclose(run(ids).asnumpy(), twins.logits(model), atol=1e-6)
    with model.disable_adapter():
        np.testing.assert_allclose(run(ids).asnumpy(), twins.logits(twins.make_model()), atol=1e-6)


def test_reserved_room_needs_no_new_graph(twins):
    model = get_peft_model(twins.make_model(), config(r=2, rank_pattern={"query": 3}), slot_rank=16)
    twins.logits(model)
    first = set(model.compile_cache)
    model.add_adapter("large", config(r=16))
    model.set_adapter("large")
    twins.logits(model)
    assert model.compile_cache == first


def test_set_train_after_a_first_call_takes_effect(twins):
    model = get_peft_model(twins.make_model(), config(lora_dropout=0.5))
    plain = twins.logits(model)
    model.set_train(True)
    assert not np.array_equal(twins.logits(model), plain)
    model.set_train(False)
    np.testing.assert_array_equal(twins.logits(model), plain)
