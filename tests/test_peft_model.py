"""PeftModel: adding, switching, disabling and deleting adapters, on the twin model."""

from __future__ import annotations

import logging

import mindspore as ms
import numpy as np
import peft
import pytest
from mindspore import Tensor, nn

from mindpeft import LoraConfig, PeftModel, get_peft_model
from mindpeft.errors import InputError
from tests.random_lora import config, graphs

pytestmark = pytest.mark.usefixtures("graph_mode")


def test_each_adapter_alone_gives_the_same_logits(twins, three, tmp_path):
    three.save_pretrained(tmp_path)
    for name in ("four", "eight", "sixteen"):
        three.set_adapter(name)
        alone = PeftModel.from_pretrained(twins.make_model(), tmp_path / name)
        np.testing.assert_allclose(twins.logits(alone), twins.logits(three), atol=1e-6)


class Tied(nn.Cell):
    """A head that shares the embedding's matrix."""

    def __init__(self):
        super().__init__()
        self.words = nn.Embedding(6, 4)
        self.query = nn.Dense(4, 4)
        self.head = nn.Dense(4, 6, has_bias=False)
        self.head.weight = self.words.embedding_table

    def construct(self, ids):
        return self.head(self.query(self.words(ids)))


def test_a_saved_head_is_untied_from_the_embedding():
    base, ids = Tied(), Tensor([[1, 2]], ms.int32)
    before = base(ids).asnumpy()
    model = get_peft_model(base, config(target_modules=["query"], modules_to_save=["head"]))
    assert model.get_nb_trainable_parameters() == (64 + 24, 24 + 20 + 64 + 24)
    words = base.words.embedding_table.asnumpy().copy()
    base.head.weight.set_data(Tensor(words + 1))
    np.testing.assert_array_equal(base.words.embedding_table.asnumpy(), words)
    assert not np.array_equal(model(ids).asnumpy(), before)
    with model.disable_adapter():
        np.testing.assert_array_equal(model(ids).asnumpy(), before)
    bare = model.unload()
    assert bare.head.weight is bare.words.embedding_table
    np.testing.assert_array_equal(bare(ids).asnumpy(), before)


def test_values_trained_in_the_slot_survive_a_switch(twins, three):
    three.set_adapter("four")
    parameter = next(p for p in three.trainable_params() if "lora_B" in p.name)
    value = np.zeros(parameter.shape, np.float32)
    value[:, :4] = 7
    parameter.set_data(Tensor(value))
    trained = twins.logits(three)
    three.set_adapter("sixteen")
    three.set_adapter("four")
    np.testing.assert_array_equal(twins.logits(three), trained)


def test_only_the_active_adapter_trains(twins, three):
    three.set_adapter("four")
    names = {p.name for p in three.trainable_params()}
    assert len(names) == 12
    assert all(("query.lora_" in name) or ("value.lora_" in name) for name in names)
    three.set_adapter("sixteen")
    names = {p.name for p in three.trainable_params()}
    assert "words.lora_embedding_A" in names
    assert "LayerNorm.beta" in names
    assert not any("query.lora" in name for name in names)


def test_base_parameter_names_stay(twins):
    before = [p.name for p in twins.make_model().get_parameters()]
    model = get_peft_model(twins.make_model(), config(target_modules=["query", "words", "c_attn"]))
    names = [p.name for p in model.get_parameters()]
    assert len(names) == len(set(names))
    assert set(before) <= set(names)
    assert "encoder.layer.0.attention.self.query.lora_A.weight" in names


@pytest.mark.parametrize(
    "options", [{}, {"bias": "all"}, {"task_type": "SEQ_CLS", "bias": "lora_only"}], ids=str
)
def test_disabled_is_the_base_model(twins, options):
    base = twins.logits(twins.make_model())
    model = get_peft_model(twins.make_model(), config(**options))
    for parameter in model.trainable_params():
        parameter.set_data(parameter + 0.1)
    adapted = twins.logits(model)
    compiled = graphs(model)
    with model.disable_adapter():
        np.testing.assert_array_equal(twins.logits(model), base)
        with model.disable_adapter():
            np.testing.assert_array_equal(twins.logits(model), base)
        np.testing.assert_array_equal(twins.logits(model), base)
    np.testing.assert_array_equal(twins.logits(model), adapted)
    with pytest.raises(RuntimeError), model.disable_adapter():
        raise RuntimeError
    np.testing.assert_array_equal(twins.logits(model), adapted)
    assert graphs(model) == compiled


def test_delete(twins, three):
    three.set_adapter("eight")
    eight = twins.logits(three)
    three.set_adapter("four")
    four = twins.logits(three)
    three.delete_adapter("sixteen")
    np.testing.assert_array_equal(twins.logits(three), four)
    three.delete_adapter("four")
    assert three.active_adapter == "eight"
    np.testing.assert_array_equal(twins.logits(three), eight)
    three.delete_adapter("eight")
    assert three.active_adapter is None
    assert three.trainable_params() == []
    np.testing.assert_array_equal(twins.logits(three), twins.logits(twins.make_model()))
    three.add_adapter("new", config(r=3))
    assert three.active_adapter == "new"
    assert list(three.peft_config) == ["new"]


def test_adding_while_another_is_active_changes_nothing(twins):
    model = get_peft_model(twins.make_model(), config(bias="all", task_type="SEQ_CLS"))
    for parameter in model.trainable_params():
        parameter.set_data(parameter + 0.1)
    before, trained = twins.logits(model), {p.name for p in model.trainable_params()}
    model.add_adapter("other", config(target_modules=["dense"], task_type="SEQ_CLS"))
    np.testing.assert_allclose(twins.logits(model), before, atol=1e-6)
    assert {p.name for p in model.trainable_params()} == trained
    # The other one starts from the base's own head, not from the active adapter's.
    model.set_adapter("other")
    head = model._bank.base.places["classifier.weight"].read()
    np.testing.assert_array_equal(head, twins.make_model().classifier.weight.asnumpy())


def test_numbers_with_several_adapters_equal_pefts(twins, capsys):
    options = [{"r": 4, "target_modules": ["query"]}, {"r": 8, "target_modules": ["query", "words"]}]
    model = get_peft_model(twins.make_model(), LoraConfig(**options[0], modules_to_save=["classifier"]))
    model.add_adapter("b", LoraConfig(**options[1]))
    theirs = peft.get_peft_model(
        twins.make_torch(), peft.LoraConfig(**options[0], modules_to_save=["classifier"])
    )
    theirs.add_adapter("b", peft.LoraConfig(**options[1]))
    for name in ("b", "default"):
        model.set_adapter(name)
        theirs.set_adapter(name)
        assert model.get_nb_trainable_parameters() == theirs.get_nb_trainable_parameters()
    theirs.print_trainable_parameters()
    expected = capsys.readouterr().out
    model.print_trainable_parameters()
    assert capsys.readouterr().out == expected


def test_calls_and_attributes_pass_through(twins):
    model = get_peft_model(twins.make_model(), config())
    ids, labels = Tensor(twins.IDS), Tensor([0, 2, 1, 1], ms.int32)
    plain = model(ids).asnumpy()
    np.testing.assert_array_equal(model(input_ids=ids).asnumpy(), plain)
    np.testing.assert_array_equal(model(ids, None).asnumpy(), plain)
    np.testing.assert_array_equal(model(ids, labels=None).asnumpy(), plain)
    loss, logits = model(ids, labels=labels)
    np.testing.assert_allclose(logits.asnumpy(), plain, atol=1e-6)
    assert loss.shape == ()
    assert model.config.model_type == "bert"
    assert model.get_base_model() is model.base_model
    with pytest.raises(AttributeError, match="nonsense"):
        model.nonsense  # noqa: B018


def test_inference_adapters_are_frozen(twins, tmp_path):
    get_peft_model(twins.make_model(), config(task_type="SEQ_CLS")).save_pretrained(tmp_path)
    frozen = PeftModel.from_pretrained(twins.make_model().set_train(True), tmp_path)
    assert frozen.trainable_params() == []
    assert frozen.training is False
    assert frozen.peft_config["default"].inference_mode is True
    assert frozen.get_nb_trainable_parameters()[0] == 0
    open_ = PeftModel.from_pretrained(twins.make_model(), tmp_path, is_trainable=True)
    assert {p.name for p in open_.trainable_params()} >= {"classifier.weight", "classifier.bias"}
    open_.load_adapter(tmp_path, "second")
    open_.set_adapter("second")
    assert open_.trainable_params() == []
    open_.set_adapter("default")
    assert open_.trainable_params()


@pytest.mark.parametrize(
    ("act", "message"),
    [
        (
            lambda m: m.set_adapter("fuor"),
            "no adapter 'fuor'; did you mean 'four'\\?; there are: 'four', 'eight'",
        ),
        (lambda m: m.delete_adapter("x"), "no adapter 'x'; there are"),
        (lambda m: m.merge_adapter(["x"]), "no adapter 'x'"),
        (lambda m: m.add_adapter("four", config()), "there is an adapter 'four' already"),
        (lambda m: m.add_adapter("a/b", config()), "'a/b' can't name an adapter"),
        (lambda m: m.add_adapter("..", config()), "'..' can't name an adapter"),
        (lambda m: m.save_pretrained("/tmp", ["x"]), "no adapter 'x'"),
        (lambda m: m.add_adapter("n", config(target_modules=["querry"])), "did you mean 'query'"),
        (lambda m: get_peft_model(m, config()), "has adapters already"),
        (lambda m: get_peft_model(m.base_model, config()), "has adapters already"),
    ],
)
def test_mistakes(three, act, message):
    with pytest.raises(InputError, match=message):
        act(three)
    assert list(three.peft_config) == ["four", "eight", "sixteen"]


def test_a_refused_config_leaves_the_model_as_it_was(twins):
    model = twins.make_model()
    for options in (
        {"target_modules": ["nope"]},
        {"target_modules": "LayerNorm"},
        {"target_modules": ["words"], "lora_bias": True},
    ):
        with pytest.raises(InputError):
            get_peft_model(model, LoraConfig(**options))
    assert all(p.requires_grad for p in model.get_parameters())
    np.testing.assert_array_equal(twins.logits(model), twins.logits(twins.make_model()))


def test_layout_is_told_by_the_cells(twins, caplog):
    with caplog.at_level(logging.WARNING, "mindpeft"):
        model = get_peft_model(twins.make_model(), config(target_modules=["c_attn"]))
    assert "fan_in_fan_out is True" in caplog.text
    assert model.peft_config["default"].fan_in_fan_out is True
