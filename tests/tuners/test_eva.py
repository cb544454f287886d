"""EVA against PEFT: the same batches give the same ranks and the same A's, up to the signs of their rows."""

from __future__ import annotations

import json

import mindspore as ms
import numpy as np
import peft
import pytest
import torch
from peft.utils.incremental_pca import IncrementalPCA

from mindpeft import EvaConfig, LoraConfig, PeftModel, get_peft_model, initialize_lora_eva_weights
from mindpeft.errors import InputError
from mindpeft.tuners import eva_survey
from tests.tuners.against_peft import read_config
from tests.tuners.oracle import curve, torch_curve

TARGETS = {"target_modules": ["query", "key", "intermediate", "output.dense", "c_attn"], "r": 3}
RANDOM = np.random.default_rng(8)
BATCHES = [{"input_ids": RANDOM.integers(1, 23, (6, 8)).astype(np.int32)} for _ in range(3)]
for batch in BATCHES:
    batch["attention_mask"] = (np.arange(8) < RANDOM.integers(5, 9, (6, 1))).astype(np.int32)
    batch["labels"] = np.where(RANDOM.random((6, 8)) < 0.2, -100, 1).astype(np.int32)
CASES = {
    "plain": TARGETS,
    "patterns": {
        **TARGETS,
        "lora_alpha": 5,
        "rank_pattern": {"query": 4, "c_attn": 2},
        "alpha_pattern": {"c_attn": 3},
        "eva_config": {"rho": 1.5, "use_label_mask": False, "adjust_scaling_factors": False},
    },
    "even": {**TARGETS, "use_rslora": True, "eva_config": {"rho": 1.0, "tau": 0.999}},
    "white": {"target_modules": ["query", "intermediate"], "r": 2, "eva_config": {"whiten": True}},
}


def eva_options(options: dict, owner: type) -> dict:
    given = owner(**options.get("eva_config", {}))
    return {**options, "init_lora_weights": "eva", "eva_config": given}


def in_peft(twins, options: dict) -> peft.PeftModel:
    model = peft.PeftModel(twins.make_torch(), peft.LoraConfig(**eva_options(options, peft.EvaConfig)))
    batches = [{key: torch.tensor(value).long() for key, value in batch.items()} for batch in BATCHES]
    peft.initialize_lora_eva_weights(model, batches, show_progress_bar=False)
    return model.eval()


def here(twins, options: dict) -> PeftModel:
    model = get_peft_model(twins.make_model(), LoraConfig(**eva_options(options, EvaConfig)))
    initialize_lora_eva_weights(model, BATCHES)
    return model


@pytest.fixture(autouse=True)
def graph_mode():
    ms.set_context(mode=ms.GRAPH_MODE)
    yield
    ms.set_context(mode=ms.GRAPH_MODE)


@pytest.fixture
def exactly(monkeypatch):
    """Both sides decompose exactly, instead of roughly by random numbers of their own."""

    def theirs(self, table):
        u, values, v = torch.linalg.svd(table, full_matrices=False)
        return u[:, : self.lowrank_q], values[: self.lowrank_q], v[: self.lowrank_q]

    def ours(table, rank, iterations):
        u, values, v = np.linalg.svd(table, full_matrices=False)
        return u[:, :rank], values[:rank], v[:rank]

    monkeypatch.setattr(IncrementalPCA, "_svd_fn_lowrank", theirs)
    monkeypatch.setattr(eva_survey, "low_rank_svd", ours)


@pytest.mark.usefixtures("exactly")
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name == "white" else pytest.mark.slow) for name in CASES]
)
def test_the_ranks_and_the_factors_are_pefts(twins, tmp_path, name):
    theirs, ours = in_peft(twins, CASES[name]), here(twins, CASES[name])
    assert ms.get_context("mode") == ms.GRAPH_MODE
    assert ours.training == twins.make_model().training
    mine, config = ours.peft_config["default"], theirs.peft_config["default"]
    assert mine.rank_pattern == config.rank_pattern
    assert mine.alpha_pattern == pytest.approx(config.alpha_pattern)
    assert mine.target_modules == set(config.target_modules)
    found = ours._bank.export("default")[0][1]
    expected = {key: value.numpy() for key, value in peft.get_peft_model_state_dict(theirs).items()}
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        sign = np.sign((found[key] * value).sum(1, keepdims=True)) if "lora_A" in key else 1.0
        np.testing.assert_allclose(found[key] * sign, value, atol=1e-4, err_msg=key)
    np.testing.assert_allclose(twins.logits(ours), twins.logits(twins.make_model()), atol=1e-6)
    ours.save_pretrained(tmp_path / "ours")
    theirs.save_pretrained(tmp_path / "theirs")
    assert read_config(tmp_path / "ours") == read_config(tmp_path / "theirs")


def test_it_trains_on_and_is_read_back(twins, tmp_path):
    """Training goes on as PEFT's does from the same file, and PEFT opens what comes out."""
    ours = here(twins, CASES["plain"])
    ours.save_pretrained(tmp_path / "fresh")
    theirs = peft.PeftModel.from_pretrained(twins.make_torch(), tmp_path / "fresh", is_trainable=True)
    losses = curve(ours, twins.IDS, 10)
    np.testing.assert_allclose(losses, torch_curve(theirs, twins.IDS, 10), atol=1e-3)
    assert losses[-1] < 0.8 * losses[0]
    ours.save_pretrained(tmp_path / "trained")
    again = PeftModel.from_pretrained(twins.make_model(), tmp_path / "trained")
    np.testing.assert_allclose(twins.logits(again), twins.logits(ours.set_train(False)), atol=1e-6)
    read = peft.PeftModel.from_pretrained(twins.make_torch(), tmp_path / "trained").eval()
    np.testing.assert_allclose(twins.torch_logits(read), twins.logits(again), atol=1e-5)


def test_beside_what_it_knows_nothing_of(twins):
    """Embeddings begin as ordinary LoRA, trained tokens and other adapters stay, DoRA's lengths are W's."""
    options = {"target_modules": ["query", "words"], "r": 2, "trainable_token_indices": {"kinds": [2, 4]}}
    model = get_peft_model(twins.make_model(), LoraConfig(**options, init_lora_weights="eva"))
    model.add_adapter("plain", LoraConfig(target_modules=["query"], init_lora_weights=False))
    model.set_adapter("plain")
    expected = twins.logits(model)
    model.set_adapter("default")
    initialize_lora_eva_weights(model, [{"input_ids": batch["input_ids"]} for batch in BATCHES])
    np.testing.assert_allclose(twins.logits(model), twins.logits(twins.make_model()), atol=1e-6)
    tensors = model._bank.export("default")[0][1]
    assert not tensors["base_model.model.words.lora_embedding_A"].any()
    assert tensors["base_model.model.words.lora_embedding_B"].all()
    assert tensors["base_model.model.kinds.token_adapter.trainable_tokens_delta"].shape == (2, twins.WIDTH)
    model.set_adapter("plain")
    np.testing.assert_allclose(twins.logits(model), expected, atol=1e-6)
    dora = get_peft_model(
        twins.make_model(), LoraConfig(target_modules=["query"], use_dora=True, r=2, init_lora_weights="eva")
    )
    initialize_lora_eva_weights(dora, iter(BATCHES))
    np.testing.assert_allclose(twins.logits(dora), twins.logits(twins.make_model()), atol=1e-5)


def test_rows_that_fill_a_batch_up_do_not_count(twins):
    """``example_mask`` leaves rows out, as a mask of attention would."""
    filled = [{**batch, "example_mask": np.array([1, 1, 1, 1, 0, 0], np.float32)} for batch in BATCHES]
    cut = [{key: value[:4] for key, value in batch.items()} for batch in BATCHES]
    found = []
    for batches in (filled, cut):
        model = get_peft_model(twins.make_model(), LoraConfig(**TARGETS, init_lora_weights="eva"))
        initialize_lora_eva_weights(model, batches)
        found.append(model._bank.export("default")[0][1])
    assert found[0].keys() == found[1].keys()
    for key, value in found[0].items():
        np.testing.assert_allclose(value, found[1][key], atol=1e-4, err_msg=key)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"eva_config": {"rho": 0.5}}, "eva_config.rho must be at least 1"),
        ({"eva_config": {"tau": 2}}, r"eva_config.tau must lie in \[0, 1\]"),
        ({"eva_config": {"roh": 2}}, "eva_config has an unknown key 'roh'; did you mean 'rho'"),
        ({"eva_config": {"whiten": 1}}, "eva_config.whiten must be true or false"),
        ({"eva_config": [2]}, "eva_config must be an object"),
        ({"r": 9}, "has 16 inputs, too few for 18 components"),
        ({"r": 8, "batches": [{"input_ids": BATCHES[0]["input_ids"][:1]}]}, "a batch of at least 16 tokens"),
        ({"batches": []}, "EVA needs batches of data, and there are none"),
        ({"init_lora_weights": True}, "'default' is no fresh adapter with init_lora_weights=\"eva\""),
        ({"adapter": "other"}, "no adapter 'other'"),
    ],
)
def test_refuses(twins, options, message):
    options = {"target_modules": ["query"], "init_lora_weights": "eva", **options}
    batches, adapter = options.pop("batches", BATCHES), options.pop("adapter", "default")
    with pytest.raises(InputError, match=message):
        initialize_lora_eva_weights(
            get_peft_model(twins.make_model(), LoraConfig(**options)), batches, adapter
        )


def test_the_config_of_a_file_of_pefts(tmp_path):
    peft.LoraConfig(init_lora_weights="eva", eva_config=peft.EvaConfig(rho=1.5)).save_pretrained(tmp_path)
    config = LoraConfig.from_pretrained(tmp_path)
    assert config.eva_config == EvaConfig(rho=1.5)
    config.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["eva_config"]["rho"] == 1.5
