"""The decoders against transformers: logits, losses, heads, masks, gradients, files."""

from __future__ import annotations

import json

import mindspore as ms
import numpy as np
import peft
import pytest
import torch
import transformers
from mindspore import Tensor
from safetensors.torch import load_file

from mindpeft import PeftModel
from mindpeft import models as our_models
from mindpeft.errors import InputError
from mindpeft.models import AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification
from mindpeft.train.step import EvalStep
from tests.models.decoders import (
    ARCHITECTURES,
    CASES,
    VOCABULARY,
    labels_of,
    make_decoder,
    make_texts,
    scaled_error,
    train_both,
)
from tests.models.reference import absolute_error, relative_error, run_ours, run_theirs, to_numpy

HEADS = ("SequenceClassification", "TokenClassification")
# By default some are compiled; the slow run has every architecture and odd feature.
COMPILED = [
    pytest.param(name, marks=() if name in ("llama_yarn", "gpt2", "bloom", "gemma3") else pytest.mark.slow)
    for name in CASES
]


@pytest.mark.usefixtures("pynative")
@pytest.mark.parametrize("name", CASES)
def test_logits_and_loss(tmp_path, name):
    theirs = make_decoder(name, tmp_path)
    ours = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert not ours.load_report.unused
    assert not ours.load_report.newly_initialised
    batch = make_texts()
    labels = labels_of(batch)
    expected = run_theirs(theirs, **batch, labels=labels)
    loss, logits = run_ours(ours, **batch, labels=labels)
    assert scaled_error(logits, expected.logits, batch["attention_mask"]) <= 1e-5
    assert absolute_error(loss, expected.loss) <= 1e-5


@pytest.mark.usefixtures("graph_mode")
@pytest.mark.parametrize("name", COMPILED)
def test_logits_compiled(tmp_path, name):
    theirs = make_decoder(name, tmp_path)
    ours = AutoModelForCausalLM.from_pretrained(tmp_path)
    batch = make_texts()
    expected = run_theirs(theirs, **batch).logits
    assert scaled_error(run_ours(ours, **batch), expected, batch["attention_mask"]) <= 1e-5


@pytest.mark.usefixtures("pynative")
@pytest.mark.parametrize("name", ["llama", "gpt2", "bloom", "opt", "gemma3", "mistral"])
def test_masks_and_embeddings(tmp_path, name):
    theirs, ours = make_decoder(name, tmp_path), AutoModelForCausalLM.from_pretrained(tmp_path)
    left = make_texts(left=True)
    expected = run_theirs(theirs, **left).logits
    assert scaled_error(run_ours(ours, **left), expected, left["attention_mask"]) <= 1e-5
    ids = left["input_ids"]
    assert scaled_error(run_ours(ours, input_ids=ids), run_theirs(theirs, input_ids=ids).logits) <= 1e-5
    words = ours.get_input_embeddings()(Tensor(ids)).asnumpy()
    assert (
        absolute_error(run_ours(ours, input_ids=None, inputs_embeds=words), run_ours(ours, input_ids=ids))
        < 1e-6
    )


@pytest.mark.usefixtures("pynative")
@pytest.mark.parametrize("name", ["llama", "mistral", "gpt2", "bloom", "gemma3"])
def test_samples_in_one_row_do_not_see_each_other(tmp_path, name):
    make_decoder(name, tmp_path)
    ours = AutoModelForCausalLM.from_pretrained(tmp_path)
    ids = make_texts(rows=1)["input_ids"]
    numbers = np.array([[1] * 9 + [2] * 11 + [0] * 3], np.int32)
    positions = np.array([[*range(9), *range(11), 0, 0, 0]], np.int32)
    packed = to_numpy(run_ours(ours, input_ids=ids, attention_mask=numbers, position_ids=positions))
    for start, end in ((0, 9), (9, 20)):
        alone = run_ours(ours, input_ids=ids[:, start:end])
        assert scaled_error(packed[:, start:end], alone) <= 1e-6


@pytest.mark.usefixtures("pynative")
@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("name", ARCHITECTURES.values())
def test_heads(tmp_path, name, head):
    if name == "opt" and head == "TokenClassification":
        make_decoder(name, tmp_path)
        with pytest.raises(InputError, match="has no AutoModelForTokenClassification"):
            our_models.AutoModelForTokenClassification.from_pretrained(tmp_path)
        return
    if name == "gemma3" and head == "TokenClassification":
        pytest.skip("transformers has no token classifier on the text model of Gemma 3")
    theirs = make_decoder(name, tmp_path, head, num_labels=5)
    ours = getattr(our_models, f"AutoModelFor{head}").from_pretrained(tmp_path)
    assert not ours.load_report.unused
    assert not ours.load_report.newly_initialised
    batch = make_texts()
    shape = batch["input_ids"].shape[: 1 + (head == "TokenClassification")]
    labels = np.random.default_rng(1).integers(0, 5, shape).astype(np.int32)
    mask = batch["attention_mask"] if head == "TokenClassification" else None
    if mask is not None:
        labels[mask == 0] = -100
    expected = run_theirs(theirs, **batch, labels=labels)
    loss, logits = run_ours(ours, **batch, labels=labels)
    assert scaled_error(logits, expected.logits, mask) <= 1e-5
    assert absolute_error(loss, expected.loss) <= 1e-5


@pytest.mark.usefixtures("pynative")
def test_the_last_token_needs_a_padding_token(tmp_path):
    make_decoder("llama", tmp_path, "SequenceClassification")
    ours = AutoModelForSequenceClassification.from_pretrained(tmp_path, pad_token_id=None)
    with pytest.raises(InputError, match=r"can't be told without a pad_token_id.*tokenizer.pad_token_id"):
        run_ours(ours, **make_texts())
    assert run_ours(ours, **make_texts(rows=1)).shape == (1, 2)


@pytest.mark.usefixtures("pynative")
@pytest.mark.parametrize("name", ARCHITECTURES.values())
def test_features_and_hidden_states(tmp_path, name):
    theirs = make_decoder(name, tmp_path, head="")
    ours = AutoModel.from_pretrained(tmp_path)
    batch = make_texts(rows=1)
    expected = run_theirs(theirs, **batch, output_hidden_states=True)
    hidden, states = run_ours(ours, **batch, output_hidden_states=True)
    assert relative_error(hidden, expected.last_hidden_state) <= 1e-5
    assert len(states) == len(expected.hidden_states) == 3
    assert relative_error(states[1], expected.hidden_states[1]) <= 1e-5


@pytest.mark.usefixtures("pynative")
@pytest.mark.parametrize("name", CASES)
def test_written_checkpoints_are_the_same_bits(tmp_path, name):
    theirs = make_decoder(name, tmp_path / "theirs")
    ours = AutoModelForCausalLM.from_pretrained(tmp_path / "theirs")
    ours.save_pretrained(tmp_path / "ours")
    written = load_file(tmp_path / "ours" / "model.safetensors")
    expected = load_file(tmp_path / "theirs" / "model.safetensors")
    assert written.keys() >= expected.keys()  # tied weights may stand under both names
    assert all(torch.equal(written[key], value) for key, value in expected.items())
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "ours", attn_implementation="eager")
    batch = make_texts()
    assert torch.equal(run_theirs(again.eval(), **batch).logits, run_theirs(theirs, **batch).logits)


def lora_pair(name: str, folder, noise: float = 0.05):
    """PEFT's model with LoRA on all linear cells, random, and ours opened from its files."""
    base = make_decoder(name, folder / "base")
    config = peft.LoraConfig(task_type="CAUSAL_LM", r=4, lora_alpha=8, target_modules="all-linear")
    theirs = peft.get_peft_model(base, config)
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in theirs.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * noise)
    theirs.save_pretrained(folder / "adapter")
    ours = AutoModelForCausalLM.from_pretrained(folder / "base")
    return PeftModel.from_pretrained(ours, folder / "adapter", is_trainable=True), theirs


def trained_parameters(model: PeftModel) -> dict[str, ms.Parameter]:
    return {parameter.name: parameter for parameter in model.trainable_params()}


@pytest.mark.usefixtures("pynative")
@pytest.mark.parametrize("name", ARCHITECTURES.values())
def test_lora_logits_and_gradients(tmp_path, name):
    ours, theirs = lora_pair(name, tmp_path)
    batch, parameters = make_texts(), trained_parameters(ours)
    columns = {**batch, "labels": labels_of(batch)}
    assert ours.get_nb_trainable_parameters() == theirs.get_nb_trainable_parameters()
    expected = run_theirs(theirs, **columns)
    expected.loss.backward()
    step = EvalStep(ours, tuple(columns))

    def forward(*values):
        return step(*values)

    weights = ms.ParameterTuple(parameters.values())
    function = ms.value_and_grad(forward, None, weights, has_aux=True)
    (loss, logits), gradients = function(*map(Tensor, columns.values()))
    assert scaled_error(logits, expected.logits, batch["attention_mask"]) <= 1e-5
    assert absolute_error(loss, expected.loss) <= 1e-5
    wanted = {
        key.replace("base_model.model.", "").replace(".default", ""): value.grad
        for key, value in theirs.named_parameters()
        if value.requires_grad
    }
    floor = 1e-2 * max(float(value.abs().max()) for value in wanted.values())
    assert set(wanted) == set(parameters)
    for key, gradient in zip(parameters, gradients, strict=True):
        worst = absolute_error(gradient, wanted[key]) / max(float(wanted[key].abs().max()), floor)
        assert worst <= 1e-4, key


@pytest.mark.usefixtures("graph_mode")
@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=() if name in ("llama", "gpt2") else pytest.mark.slow)
        for name in ARCHITECTURES.values()
    ],
)
def test_lora_curve(tmp_path, name):
    """Twenty steps of AdamW in one compiled graph give PEFT's losses."""
    ours, theirs = lora_pair(name, tmp_path, noise=0.02)
    batch = make_texts()
    runner, found, expected = train_both(ours, theirs, [{**batch, "labels": labels_of(batch)}] * 20, 5e-3)
    assert runner.graphs == 1
    assert found[-1] < found[0] - 0.1
    assert np.abs(found - expected).max() <= 1e-3


BAD = {
    "heads": ({"num_attention_heads": 3}, "hidden_size 64 is no multiple of num_attention_heads 3"),
    "key heads": ({"num_key_value_heads": 3}, "no multiple of num_key_value_heads 3"),
    "scaling": ({"rope_scaling": {"type": "lineal", "factor": 2}}, "did you mean 'linear'"),
    "factor": ({"rope_scaling": {"type": "linear"}}, "needs a positive factor, not None"),
    "list": ({"rope_scaling": {"type": "longrope", "factor": 2}}, "needs short_factor with 8 numbers"),
    "activation": ({"hidden_act": "slu"}, "unknown activation 'slu'"),
    "layers": ({"num_hidden_layers": 0}, "num_hidden_layers must be at least 1"),
    "type": ({"rope_theta": "big"}, "rope_theta must be a finite number or null"),
}


@pytest.mark.parametrize(("changes", "message"), BAD.values(), ids=BAD)
def test_malformed_configs(tmp_path, changes, message):
    keys = {**CASES["llama"][1], "vocab_size": VOCABULARY, "model_type": "llama", **changes}
    (tmp_path / "config.json").write_text(json.dumps(keys))
    with pytest.raises(InputError, match=message):
        AutoModelForCausalLM.from_config(our_models.AutoConfig.from_pretrained(tmp_path))
