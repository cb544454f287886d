"""Adapters combined into a new one, against PEFT."""

from __future__ import annotations

import mindspore as ms
import numpy as np
import peft
import pytest
from safetensors.numpy import load_file

from mindpeft import LoraConfig, get_peft_model
from mindpeft.errors import InputError
from mindpeft.tuners.task_vectors import keep_random

CONFIGS = {
    "one": {"r": 4, "lora_alpha": 3, "target_modules": ["query", "value", "words"]},
    "two": {"r": 4, "lora_alpha": 9, "target_modules": ["query", "dense", "c_attn"]},
    "three": {"r": 4, "use_rslora": True, "target_modules": ["query", "words"]},
    "wide": {"r": 7, "target_modules": ["query"], "rank_pattern": {"layer.1.attention.self.query": 2}},
}


@pytest.fixture
def model(twins, graph_mode):
    ms.set_seed(7)
    configs = {name: LoraConfig(**options, init_lora_weights=False) for name, options in CONFIGS.items()}
    made = get_peft_model(twins.make_model(), configs.pop("one"), "one")
    for name, config in configs.items():
        made.add_adapter(name, config)
    return made


def theirs_of(twins, model, folder):
    model.save_pretrained(folder)
    theirs = peft.PeftModel.from_pretrained(twins.make_torch(), folder / "one", adapter_name="one")
    for name in list(CONFIGS)[1:]:
        theirs.load_adapter(folder / name, name)
    return theirs.eval()


COMBINATIONS = [
    ("linear", ["one", "two"], [0.7, -0.4], {}),
    ("cat", ["one", "two", "wide"], [0.7, -0.4, 1.0], {}),
    ("svd", ["one", "two", "wide"], [0.7, -0.4, 1.0], {"svd_rank": 5}),
    ("ties", ["one", "two"], [1.0, 0.5], {"density": 0.4}),
    ("ties", ["two", "one"], [1.0, 0.5], {"density": 0.6, "majority_sign_method": "frequency"}),
    ("ties_svd", ["one", "two", "wide"], [1.0, 0.5, 0.2], {"density": 0.3}),
    ("magnitude_prune", ["one", "two"], [1.0, 0.5], {"density": 0.4}),
    ("magnitude_prune_svd", ["one", "two"], [1.0, 0.5], {"density": 0.4}),
    ("dare_linear", ["one", "two"], [1.0, 0.5], {"density": 1.0}),  # nothing is dropped: comparable
    ("dare_ties_svd", ["one", "two"], [1.0, 0.5], {"density": 1.0}),
]


@pytest.mark.parametrize(("kind", "names", "weights", "options"), COMBINATIONS)
def test_the_same_as_peft(twins, model, tmp_path, kind, names, weights, options):
    theirs = theirs_of(twins, model, tmp_path)
    theirs.add_weighted_adapter(names, weights, "new", combination_type=kind, **options)
    theirs.set_adapter("new")
    model.add_weighted_adapter(names, weights, "new", combination_type=kind, **options)
    assert model.active_adapter == "one"
    model.set_adapter("new")
    np.testing.assert_allclose(twins.logits(model), twins.torch_logits(theirs), atol=2e-5)
    assert model.peft_config["new"].r == theirs.peft_config["new"].r


def test_clamping_cuts_the_factors_off(model, tmp_path):
    """Not compared with PEFT: the quantile depends on the signs that a decomposition leaves open."""
    largest = {}
    for clamp in (None, 0.8):
        name = f"clamp{clamp}"
        model.add_weighted_adapter(["one", "two"], [1.0, 2.0], name, svd_clamp=clamp)
        model.save_pretrained(tmp_path, selected_adapters=[name])
        tensors = load_file(tmp_path / name / "adapter_model.safetensors")
        a, b = (tensors[f"base_model.model.c_attn.lora_{side}.weight"] for side in "AB")
        largest[clamp] = np.abs(np.concatenate([a.reshape(-1), b.reshape(-1)]))
    limit = largest[0.8].max()
    assert limit < largest[None].max()
    assert (largest[0.8] == limit).sum() > 0.1 * largest[0.8].size


def test_cat_is_exact(twins, model):
    """Also with rank-stabilised scaling, which PEFT's combined config keeps by mistake."""
    names = ["one", "three"]
    model.set_adapter(names)
    together = twins.logits(model)
    model.add_weighted_adapter(names, [1.0, 1.0], "sum", combination_type="cat")
    model.set_adapter("sum")
    np.testing.assert_allclose(twins.logits(model), together, atol=1e-5)
    model.add_weighted_adapter(
        ["sum", "three"], [1.0, -1.0], "difference", combination_type="svd", svd_rank=4
    )
    model.set_adapter("difference")
    found = twins.logits(model)
    model.set_adapter("one")
    np.testing.assert_allclose(found, twins.logits(model), atol=2e-5)


def test_a_combined_adapter_is_an_ordinary_one(twins, model, tmp_path):
    model.add_weighted_adapter(["one", "wide"], [1.0, 0.5], "new", combination_type="cat")
    model.set_adapter("new")
    expected = twins.logits(model)
    model.save_pretrained(tmp_path, selected_adapters=["new"])
    theirs = peft.PeftModel.from_pretrained(twins.make_torch(), tmp_path / "new").eval()
    np.testing.assert_allclose(twins.torch_logits(theirs), expected, atol=1e-5)
    np.testing.assert_allclose(twins.logits(model.merge_and_unload()), expected, atol=1e-5)


def test_one_head_comes_along(twins, model):
    model.add_adapter("headed", LoraConfig(r=4, target_modules=["query"], task_type="SEQ_CLS"))
    model.set_adapter("headed")
    head = next(p for p in model.trainable_params() if p.name == "classifier.bias")
    head.set_data(head + 1.0)
    model.add_weighted_adapter(["one", "headed"], [0.0, 1.0], "new", combination_type="cat")
    expected = twins.logits(model)
    model.set_adapter("new")
    np.testing.assert_allclose(twins.logits(model), expected, atol=1e-5)


def test_dropping_at_random_keeps_the_mean():
    ms.set_seed(0)
    value = np.full((400, 400), 2.0, np.float32)
    kept = keep_random(value, 0.25)
    assert set(np.unique(kept)) == {0.0, 8.0}
    assert kept.mean() == pytest.approx(2.0, rel=0.03)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((["one"], [1.0, 2.0], "new"), "1 adapters, 2 weights"),
        (([], [], "new"), "one weight for each"),
        ((["one", "tow"], [1.0, 2.0], "new"), "did you mean 'two'"),
        ((["one", "two"], [1.0, float("nan")], "new"), "weights must be a number"),
        ((["one", "two"], [1.0, 2.0], "new", "tie"), "did you mean 'ties'"),
        ((["one", "wide"], [1.0, 2.0], "new", "linear"), "adapters of one rank, but they have 2, 4, 7"),
        ((["one", "two"], [1.0, 2.0], "new", "ties"), "needs a density in"),
        ((["one", "two"], [1.0, 2.0], "new", "svd", 0), "svd_rank must be a positive integer"),
        ((["one", "two"], [1.0, 2.0], "new", "svd", 2, 1.5), "svd_clamp must lie in"),
        (
            (["one", "two"], [1.0, 2.0], "new", "ties", None, None, 0.5, "most"),
            "majority_sign_method must be",
        ),
        ((["one", "two"], [1.0, 2.0], "one"), "there is an adapter 'one' already"),
        ((["one", "two"], [1.0, 2.0], "../new"), "can't name an adapter"),
        ((["one", "biased"], [1.0, 2.0], "new"), "'biased' trains biases"),
        ((["headed", "headed2"], [1.0, 2.0], "new"), "headed, headed2 have saved cells"),
    ],
)
def test_what_can_not_be_combined(model, arguments, message):
    model.add_adapter("biased", LoraConfig(target_modules=["query"], bias="lora_only"))
    for name in ("headed", "headed2"):
        model.add_adapter(name, LoraConfig(target_modules=["query"], task_type="SEQ_CLS"))
    before = list(model.peft_config)
    with pytest.raises(InputError, match=message):
        model.add_weighted_adapter(*arguments)
    assert list(model.peft_config) == before
