"""Trainable tokens, alone and beside LoRA, against torch + peft; tied output layers too."""

from __future__ import annotations

import mindspore as ms
import numpy as np
import peft
import pytest
import torch
from mindspore import Tensor, nn
from safetensors.numpy import load_file

from mindpeft import LoraConfig, PeftModel, TrainableTokensConfig, get_peft_model
from mindpeft.errors import InputError
from mindpeft.models import AutoModelForMaskedLM
from tests.models.reference import make_batch, make_reference, run_ours, run_theirs
from tests.selection import default
from tests.tuners.against_peft import (
    Method,
    check_initial_values,
    check_pynative,
    check_reading,
    check_switching,
    check_writing,
)

pytestmark = pytest.mark.usefixtures("graph_mode")

TOKENS = [3, 11, 0, 20, 7]  # the padding token too, and not in order
ALONE = Method("TrainableTokensConfig")
LORA = Method("LoraConfig", {"init_lora_weights": False, "target_modules": ["query"]})
CASES = {
    "alone": (ALONE, {"token_indices": TOKENS, "target_modules": ["words"]}),
    "both_tables": (ALONE, {"token_indices": [5, 1], "target_modules": r"words|kinds"}),
    "lora": (LORA, {"trainable_token_indices": {"words": TOKENS}}),
    "lora_two": (
        LORA,
        {"trainable_token_indices": {"words": TOKENS, "kinds": [2]}, "modules_to_save": ["classifier"]},
    ),
}


@pytest.mark.parametrize("name", default(CASES, "both_tables", "lora_two"))
def test_reads_what_peft_wrote(twins, tmp_path, name):
    method, options = CASES[name]
    check_reading(twins, tmp_path, method, **options)


@pytest.mark.parametrize("name", CASES)
def test_peft_reads_what_is_written(twins, tmp_path, name):
    method, options = CASES[name]
    check_writing(twins, tmp_path, method, **options)


def test_pynative(twins, tmp_path):
    check_pynative(twins, tmp_path, ALONE, **CASES["alone"][1])


def test_switching_between_different_tokens(twins):
    few, many = {"token_indices": [9]}, {"token_indices": list(range(8, 20))}
    where = {"target_modules": ["words"]}
    check_switching(twins, ALONE, {**many, **where}, {**few, **where}, CASES["alone"][1])


@pytest.mark.parametrize("init", [True, False])
def test_initial_values(twins, init):
    options = {"target_modules": ["words"], "token_indices": list(range(23)), "init_weights": init}
    check_initial_values(twins, ALONE, **options)


@pytest.fixture(scope="module")
def masked(tmp_path_factory):
    """A masked BERT whose output layer is tied; PEFT forgets a tied layer's bias, so there is none."""
    folder = tmp_path_factory.mktemp("masked")
    model = make_reference("masked", folder)
    torch.nn.init.zeros_(model.cls.predictions.bias)
    model.save_pretrained(folder)
    return folder


def in_peft(masked, config):
    from transformers import AutoModelForMaskedLM as Theirs

    base = Theirs.from_pretrained(masked, attn_implementation="eager").eval()
    if isinstance(config, peft.PeftConfig):
        return peft.get_peft_model(base, config)
    return peft.PeftModel.from_pretrained(base, config)


@pytest.mark.parametrize("beside_lora", [False, True])
def test_a_tied_output_layer_gets_the_same_rows(masked, tmp_path, caplog, beside_lora):
    ms.set_context(mode=ms.PYNATIVE_MODE)
    batch = make_batch()
    tokens = sorted({int(i) for i in batch["input_ids"][0][:6]})
    if beside_lora:
        config = peft.LoraConfig(trainable_token_indices=tokens, target_modules=["query"])
    else:
        config = peft.TrainableTokensConfig(token_indices=tokens)
    theirs = in_peft(masked, config)
    with torch.no_grad():
        for parameter in theirs.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    theirs.save_pretrained(tmp_path / "theirs")
    base = AutoModelForMaskedLM.from_pretrained(masked)
    plain = run_ours(base, **batch).asnumpy()
    ours = PeftModel.from_pretrained(base, tmp_path / "theirs", is_trainable=True).set_train(False)
    logits = run_theirs(theirs.eval(), **batch).logits
    np.testing.assert_allclose(run_ours(ours, **batch).asnumpy(), logits.detach().numpy(), atol=2e-5)
    assert ours.get_nb_trainable_parameters() == theirs.get_nb_trainable_parameters()

    # The gradient comes from both layers.
    (logits**2).mean().backward()
    expected = next(p.grad.numpy() for n, p in theirs.named_parameters() if "tokens_delta" in n)
    rows = next(p for p in ours.trainable_params() if "tokens_delta" in p.name)

    def loss(input_ids, attention_mask, token_type_ids):
        return (ours(input_ids, attention_mask, token_type_ids) ** 2).mean()

    found = ms.grad(loss, None, rows)(*(Tensor(value) for value in batch.values())).asnumpy()
    np.testing.assert_allclose(found, expected, atol=1e-4 * np.abs(expected).max())

    with ours.disable_adapter():
        np.testing.assert_array_equal(run_ours(ours, **batch).asnumpy(), plain)
    rows.set_data(rows * 1.5)
    adapted = run_ours(ours, **batch).asnumpy()
    ours.save_pretrained(tmp_path / "ours")
    files = [load_file(tmp_path / side / "adapter_model.safetensors") for side in ("ours", "theirs")]
    assert {k: v.shape for k, v in files[0].items()} == {k: v.shape for k, v in files[1].items()}
    again = run_theirs(in_peft(masked, tmp_path / "ours").eval(), **batch).logits
    np.testing.assert_allclose(again.detach().numpy(), adapted, atol=5e-5)
    for _ in range(2):
        ours.merge_adapter()
        np.testing.assert_allclose(run_ours(ours, **batch).asnumpy(), adapted, atol=2e-5)
        ours.unmerge_adapter()
        np.testing.assert_array_equal(run_ours(ours, **batch).asnumpy(), adapted)
    merged = run_ours(ours.merge_and_unload(), **batch).asnumpy()
    np.testing.assert_allclose(merged, adapted, atol=2e-5)
    assert "tied parameter" not in caplog.text


def test_a_tied_layers_bias_stays(tmp_path):
    """Unlike in PEFT."""
    make_reference("masked", tmp_path)
    model, batch = AutoModelForMaskedLM.from_pretrained(tmp_path), make_batch()
    plain = run_ours(model, **batch).asnumpy()
    adapted = get_peft_model(model, TrainableTokensConfig(token_indices=[4, 9]))
    np.testing.assert_allclose(run_ours(adapted, **batch).asnumpy(), plain, atol=1e-5)


def test_an_output_layer_of_its_own():
    cell = nn.SequentialCell(nn.Dense(4, 6))
    x = np.random.default_rng(0).normal(size=(2, 3, 4)).astype(np.float32)
    model = get_peft_model(cell, TrainableTokensConfig(token_indices=[5, 2], target_modules=["0"]))
    rows = np.random.default_rng(1).normal(size=(2, 4)).astype(np.float32)
    model.trainable_params()[0].set_data(Tensor(rows))
    weight, bias = cell[0].cell.weight.asnumpy().copy(), cell[0].cell.bias.asnumpy()
    weight[[5, 2]] = rows
    np.testing.assert_allclose(model(Tensor(x)).asnumpy(), x @ weight.T + bias, atol=1e-6)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: TrainableTokensConfig(), "token_indices must list the ids"),
        (lambda: TrainableTokensConfig(token_indices=[-1]), "token_indices must list the ids"),
        (
            lambda: TrainableTokensConfig(token_indices=[2, 5, 2]),
            "token_indices has the token 2 more than once",
        ),
        (lambda: TrainableTokensConfig(token_indices=["a"]), "token_indices must list the ids"),
        (lambda: TrainableTokensConfig(token_indices=[1], target_modules=5), "target_modules must be a list"),
        (lambda: LoraConfig(trainable_token_indices=[]), "trainable_token_indices must list the ids"),
        (
            lambda: LoraConfig(trainable_token_indices={"words": [1, 1]}),
            r"\['words'\] has the token 1 more than once",
        ),
    ],
)
def test_refuses_bad_values(make, message):
    with pytest.raises(InputError, match=message):
        make()


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            TrainableTokensConfig(token_indices=[23], target_modules=["words"]),
            "the token 23 is outside the 23 rows of 'words'",
        ),
        (
            TrainableTokensConfig(token_indices=[1], target_modules=["LayerNorm"]),
            "trainable tokens can't wrap the cell 'LayerNorm'",
        ),
        (
            TrainableTokensConfig(token_indices=[1], target_modules=["c_attn"]),
            "trainable tokens can't wrap the cell 'c_attn'",
        ),
        (TrainableTokensConfig(token_indices=[1]), "no cell matches target_modules 'embed_tokens'"),
        (
            LoraConfig(trainable_token_indices={"wrds": [1]}),
            "names 'wrds', which no cell's name ends with; did you mean 'words'",
        ),
        (LoraConfig(trainable_token_indices=[1]), "names 'embed_tokens'"),
        (
            LoraConfig(target_modules=["words"], trainable_token_indices={"words": [1]}),
            "take it out of target_modules",
        ),
        (
            LoraConfig(modules_to_save=["words"], trainable_token_indices={"words": [1]}),
            "take it out of target_modules",
        ),
    ],
)
def test_refuses_what_does_not_fit(twins, config, message):
    with pytest.raises(InputError, match=message):
        get_peft_model(twins.make_model(), config)
