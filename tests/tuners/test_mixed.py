"""An adapter for each row of a batch, against each adapter alone and against PEFT."""

from __future__ import annotations

import mindspore as ms
import numpy as np
import peft
import pytest
import torch
from mindspore import Tensor

from mindpeft import LoraConfig, get_peft_model
from mindpeft.errors import InputError
from tests.models.reference import make_batch, make_reference, open_ours, run_ours, run_theirs

TARGETS = [
    ["query", "value"],
    ["query", "dense"],
    ["word_embeddings", "key"],
    ["value", "intermediate.dense"],
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("base")
    make_reference("sequence", path, num_labels=4)
    return path


def noisy(model):
    for parameter in model.trainable_params():
        value = parameter.asnumpy()
        noise = np.random.normal(0, 0.1, parameter.shape) * (value != 0)  # a slot's spare rows stay zero
        parameter.set_data(Tensor((value + noise).astype(np.float32)))


def options(index: int) -> dict:
    heads = {"task_type": "SEQ_CLS"} if index % 3 else {"lora_bias": index % 2 == 0 and index % 4 != 2}
    return {"r": 1 + index % 9, "target_modules": TARGETS[index % 4], "lora_alpha": 3 + index, **heads}


@pytest.fixture
def many(folder):
    """A model with 16 adapters of mixed ranks, targets, and some with heads of their own."""
    ms.set_seed(2)
    model = get_peft_model(
        open_ours("sequence", folder), LoraConfig(**options(0), init_lora_weights=False), "a0"
    )
    for index in range(1, 16):
        model.add_adapter(f"a{index}", LoraConfig(**options(index), init_lora_weights=False))
        model.set_adapter(f"a{index}")
        noisy(model)
    return model.set_train(False)


def rows(count: int, seed: int = 1):
    return make_batch(batch=count, length=9, seed=seed, padded=False)


def test_sixteen_adapters_in_one_batch_of_32_rows(many, mode):
    batch, rng = rows(32), np.random.default_rng(0)
    alone = {}
    for name in many.peft_config:
        many.set_adapter(name)
        alone[name] = run_ours(many, **batch).asnumpy()
    with many.disable_adapter():
        alone[None] = run_ours(many, **batch).asnumpy()
    alone["__base__"] = alone[None]
    compiled = None
    for turn in range(4):
        names = [*rng.permutation([*many.peft_config, *many.peft_config][: 30 - turn]), None, "__base__"]
        names += ["a3"] * (32 - len(names))
        found = run_ours(many, **batch, adapter_names=names).asnumpy()
        for row, name in enumerate(names):
            np.testing.assert_allclose(found[row], alone[name][row], atol=1e-5, err_msg=str((row, name)))
        if compiled is None:
            compiled = len(many._mixed.compile_cache)
        assert len(many._mixed.compile_cache) == compiled <= 1
    assert np.abs(alone["a1"] - alone["a2"]).max() > 1e-2
    many.set_adapter("a5")  # and nothing of it stays behind
    np.testing.assert_allclose(run_ours(many, **batch).asnumpy(), alone["a5"], atol=1e-6)


def test_the_same_as_peft(folder, tmp_path):
    ms.set_seed(3)
    model = get_peft_model(
        open_ours("sequence", folder), LoraConfig(**options(0), init_lora_weights=False), "one"
    )
    model.add_adapter("two", LoraConfig(r=3, target_modules=["query"], init_lora_weights=False))
    model.set_train(False).save_pretrained(tmp_path)
    import transformers

    base = transformers.AutoModelForSequenceClassification.from_pretrained(
        folder, attn_implementation="eager"
    )
    theirs = peft.PeftModel.from_pretrained(base, tmp_path / "one", adapter_name="one")
    theirs.load_adapter(tmp_path / "two", "two")
    names = ["two", "__base__", "one", "one"]
    with torch.no_grad():
        expected = run_theirs(theirs.eval(), **rows(4), adapter_names=names).logits.numpy()
    np.testing.assert_allclose(run_ours(model, **rows(4), adapter_names=names).asnumpy(), expected, atol=1e-5)


def test_values_that_change_are_seen(many):
    ms.set_context(mode=ms.GRAPH_MODE)
    batch, names = rows(3), ["a1", "a4", "a4"]
    before = run_ours(many, **batch, adapter_names=names).asnumpy()
    many.set_adapter("a4")
    noisy(many)
    after = run_ours(many, **batch, adapter_names=names).asnumpy()
    np.testing.assert_allclose(after[0], before[0], atol=1e-6)
    assert np.abs(after[1:] - before[1:]).max() > 1e-3
    many.add_adapter("new", LoraConfig(r=20, target_modules=["query"], init_lora_weights=False))
    with_new = run_ours(many, **batch, adapter_names=["a1", "new", "a4"]).asnumpy()
    np.testing.assert_allclose(with_new[[0, 2]], after[[0, 2]], atol=1e-5)
    many.set_adapter("new")
    np.testing.assert_allclose(with_new[1], run_ours(many, **batch).asnumpy()[1], atol=1e-5)
    many.delete_adapter("new")
    np.testing.assert_allclose(run_ours(many, **batch, adapter_names=names).asnumpy(), after, atol=1e-5)


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["a1"], "1 names for a batch of 3 rows"),
        (["a1", "a1O", "a2"], "no adapter 'a1O'; did you mean 'a1'"),
        (["a1", 3, "a2"], "no adapter 3"),
        (["biased", "a1", "a1"], "the adapter 'biased' changes .*bias"),
        (["norms", "a1", "a1"], "the adapter 'norms' changes .*LayerNorm"),
        (["hybrid", "a1", "a1"], "a hybrid whose parts share cells"),
    ],
)
def test_what_can_not_be_mixed_is_refused(many, names, message):
    many.add_adapter("biased", LoraConfig(target_modules=["query"], bias="lora_only"))
    many.add_adapter(
        "norms", LoraConfig(target_modules=["query"], modules_to_save=["attention.output.LayerNorm"])
    )
    many.add_adapter("hybrid", [LoraConfig(target_modules=["query"]), LoraConfig(target_modules=["query"])])
    with pytest.raises(InputError, match=message):
        run_ours(many, **rows(3), adapter_names=names)


def test_no_mixing_while_training_or_merged(many):
    many.set_train(True)
    with pytest.raises(InputError, match="for inference"):
        run_ours(many, **rows(2), adapter_names=["a1", "a2"])
    many.set_train(False)
    many.merge_adapter()
    with pytest.raises(InputError, match="can't mix adapters in a batch while a15 is merged"):
        run_ours(many, **rows(2), adapter_names=["a1", "a2"])
