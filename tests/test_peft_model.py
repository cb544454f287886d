"""PeftModel: switching, disabling, merging, adding and deleting, on the twin model."""

from __future__ import annotations

import logging

import mindspore as ms
import numpy as np
import peft
import pytest
import torch
from mindspore import Tensor, nn

from mindpeft import LoraConfig, PeftModel, get_peft_model
from mindpeft.errors import InputError
from mindpeft.parameters import base_places

pytestmark = pytest.mark.usefixtures("graph_mode")


def config(**options):
    return LoraConfig(**{"target_modules": ["query", "value"], "init_lora_weights": False, **options})


@pytest.fixture
def three(twins):
    """A model with adapters of rank 4, 8 and 16, of different alphas and targets."""
    model = get_peft_model(twins.make_model(), config(r=4, lora_alpha=4), "four")
    model.add_adapter("eight", config(r=8, lora_alpha=32, target_modules=["query", "dense"]))
    model.add_adapter("sixteen", config(r=16, use_rslora=True, target_modules=["words", "value"], bias="all"))
    return model


def graphs(*cells):
    return sum(len(cell.compile_cache) for cell in cells)


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


def test_each_adapter_alone_gives_the_same_logits(twins, three, tmp_path):
    three.save_pretrained(tmp_path)
    for name in ("four", "eight", "sixteen"):
        three.set_adapter(name)
        alone = PeftModel.from_pretrained(twins.make_model(), tmp_path / name)
        np.testing.assert_allclose(twins.logits(alone), twins.logits(three), atol=1e-6)


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


def test_reserved_room_needs_no_new_graph(twins):
    model = get_peft_model(twins.make_model(), config(r=2, rank_pattern={"query": 3}), slot_rank=16)
    twins.logits(model)
    first = set(model.compile_cache)
    model.add_adapter("large", config(r=16))
    model.set_adapter("large")
    twins.logits(model)
    assert model.compile_cache == first


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


def test_merging_twenty_times_is_bit_exact(twins, three):
    weights = {name: place.read() for name, place in three._bank.base.places.items()}
    three.set_adapter("eight")
    weights = {name: place.read() for name, place in three._bank.base.places.items()}
    adapted = twins.logits(three)
    compiled = graphs(three)
    for _ in range(20):
        three.merge_adapter()
        np.testing.assert_allclose(twins.logits(three), adapted, atol=2e-6)
        three.unmerge_adapter()
        np.testing.assert_array_equal(twins.logits(three), adapted)
    assert graphs(three) == compiled
    for name, value in weights.items():
        np.testing.assert_array_equal(three._bank.base.places[name].read(), value, err_msg=name)


def test_merging_several_adapters_adds_their_deltas(twins, three):
    three.set_adapter("four")
    place = three._bank.base.places["encoder.layer.0.attention.self.value.weight"]
    before = place.read()
    for name in ("four", "sixteen"):
        three.merge_adapter([name])
        three.unmerge_adapter()
    deltas = []
    for names in (["four"], ["sixteen"], ["four", "sixteen"]):
        three.merge_adapter(names)
        deltas.append(place.read() - before)
        three.unmerge_adapter()
    np.testing.assert_allclose(deltas[0] + deltas[1], deltas[2], atol=1e-6)
    np.testing.assert_array_equal(place.read(), before)


def test_disabling_while_merged(twins, three):
    three.set_adapter("sixteen")
    three.merge_adapter()
    merged = twins.logits(three)
    with three.disable_adapter():
        np.testing.assert_array_equal(twins.logits(three), twins.logits(twins.make_model()))
    np.testing.assert_array_equal(twins.logits(three), merged)
    three.unmerge_adapter()
    np.testing.assert_allclose(twins.logits(three), merged, atol=2e-6)


OPTIONS = [
    {"target_modules": "all-linear"},
    {"target_modules": ["words", "query"], "use_rslora": True},
    {"target_modules": ["query"], "task_type": "SEQ_CLS", "bias": "all"},
    {"target_modules": ["query", "dense"], "lora_bias": True},
    {"target_modules": ["c_attn"]},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_merge_and_unload_keeps_the_logits(twins, options):
    model = get_peft_model(twins.make_model(), config(**options))
    for parameter in model.trainable_params():
        parameter.set_data(parameter + 0.01)
    adapted = twins.logits(model)
    bare = model.merge_and_unload(safe_merge=True)
    assert not [name for name, _ in bare.parameters_and_names() if "lora" in name or "base_layer" in name]
    np.testing.assert_allclose(twins.logits(bare), adapted, atol=5e-6)
    again = get_peft_model(bare, config())
    assert again.trainable_params()


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_unload_gives_the_base_back(twins, options):
    base = twins.make_model()
    weights = {p.name: p.asnumpy().copy() for p in base.get_parameters()}
    model = get_peft_model(base, config(**options))
    for parameter in model.trainable_params():
        parameter.set_data(parameter + 0.1)
    model.merge_adapter()
    bare = model.unload()
    assert bare is base
    assert {p.name for p in bare.get_parameters()} == weights.keys()
    for parameter in bare.get_parameters():
        np.testing.assert_array_equal(parameter.asnumpy(), weights[parameter.name])
    np.testing.assert_array_equal(twins.logits(bare), twins.logits(twins.make_model()))


def test_merged_weights_equal_pefts(twins, tmp_path):
    torch.manual_seed(0)
    options = {"target_modules": ["words", "query", "dense"], "init_lora_weights": False, "use_rslora": True}
    theirs = peft.get_peft_model(twins.make_torch(), peft.LoraConfig(**options))
    theirs.save_pretrained(tmp_path)
    state = theirs.merge_and_unload().state_dict()
    bare = PeftModel.from_pretrained(twins.make_model(), tmp_path).merge_and_unload()
    for name, place in base_places(bare).items():
        np.testing.assert_allclose(place.read(), state[name].numpy(), atol=1e-5, err_msg=name)


def test_half_precision_merge_rounds_once():
    dense = nn.Dense(8, 8, has_bias=False, dtype=ms.float16)
    model = get_peft_model(nn.SequentialCell(dense), config(target_modules=["0"], r=2))
    before = dense.weight.asnumpy().copy()
    a, b = (p.asnumpy() for p in model.trainable_params())
    model.merge_adapter()
    np.testing.assert_array_equal(
        dense.weight.asnumpy(), (before.astype(np.float32) + 4 * (b @ a)).astype(np.float16)
    )
    model.unmerge_adapter()
    np.testing.assert_array_equal(dense.weight.asnumpy(), before)


def test_safe_merge_refuses_before_touching_anything(twins):
    model = get_peft_model(twins.make_model(), config())
    parameter = model.trainable_params()[-1]
    parameter.set_data(Tensor(np.full(parameter.shape, np.inf, np.float32)))
    weights = {p.name: p.asnumpy().copy() for p in model.get_parameters()}
    with pytest.raises(
        InputError, match=r"values that are not finite at 'encoder\.layer\.2\.attention\.self\.value\.weight'"
    ):
        model.merge_adapter(safe_merge=True)
    for parameter in model.get_parameters():
        np.testing.assert_array_equal(parameter.asnumpy(), weights[parameter.name])


def test_saving_while_merged_or_disabled_writes_the_adapter(twins, tmp_path):
    model = get_peft_model(twins.make_model(), config(lora_bias=True, bias="lora_only"))
    adapted = twins.logits(model)
    model.merge_adapter()
    model.save_pretrained(tmp_path / "merged")
    model.unmerge_adapter()
    with model.disable_adapter():
        model.save_pretrained(tmp_path / "disabled")
    for folder in ("merged", "disabled"):
        again = PeftModel.from_pretrained(twins.make_model(), tmp_path / folder)
        np.testing.assert_allclose(twins.logits(again), adapted, atol=1e-6)


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


def test_set_train_after_a_first_call_takes_effect(twins):
    model = get_peft_model(twins.make_model(), config(lora_dropout=0.5))
    plain = twins.logits(model)
    model.set_train(True)
    assert not np.array_equal(twins.logits(model), plain)
    model.set_train(False)
    np.testing.assert_array_equal(twins.logits(model), plain)


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


def test_nothing_may_change_while_merged_or_disabled(three):
    three.merge_adapter()
    for act in (
        lambda: three.set_adapter("eight"),
        lambda: three.delete_adapter("eight"),
        lambda: three.add_adapter("n", config()),
        lambda: three.merge_adapter(),
    ):
        with pytest.raises(InputError, match="while four is merged; call unmerge_adapter\\(\\) first"):
            act()
    three.unmerge_adapter()
    with three.disable_adapter(), pytest.raises(InputError, match="inside disable_adapter"):
        three.set_adapter("eight")
    three.set_adapter("eight")


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
