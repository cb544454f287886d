"""LLaMA-Adapter against torch + peft on small decoders."""

from __future__ import annotations

import mindspore as ms
import numpy as np
import peft
import pytest
import torch
import transformers
from mindspore import Tensor
from safetensors.torch import load_file

from mindpeft import AdaptionPromptConfig, LoraConfig, PeftModel, get_peft_model
from mindpeft.errors import InputError
from mindpeft.models import AutoModelForCausalLM
from mindpeft.train.step import EvalStep
from tests.models.decoders import labels_of, make_decoder, make_texts, train_both
from tests.models.reference import absolute_error, run_ours, run_theirs

KINDS = ("llama", "mistral", "gpt2")
OPTIONS = {"task_type": "CAUSAL_LM", "adapter_len": 5, "adapter_layers": 1}


def make_pair(name: str, folder, **options):
    """PEFT's model with random tokens and gates, and ours opened from its files."""
    base = make_decoder(name, folder / "base")
    theirs = peft.get_peft_model(base, peft.AdaptionPromptConfig(**{**OPTIONS, **options}))
    torch.manual_seed(1)
    with torch.no_grad():
        for key, parameter in theirs.named_parameters():
            if "adaption_" in key:
                parameter.add_(torch.randn_like(parameter) + 0.5)
    theirs.save_pretrained(folder / "adapter")
    ours = AutoModelForCausalLM.from_pretrained(folder / "base")
    return PeftModel.from_pretrained(ours, folder / "adapter", is_trainable=True), theirs.eval()


@pytest.mark.usefixtures("pynative")
@pytest.mark.parametrize("name", KINDS)
def test_reading_gradients_and_writing(tmp_path, name):
    ours, theirs = make_pair(name, tmp_path, adapter_layers=2)
    batch = make_texts(rows=1)
    columns = {**batch, "labels": labels_of(batch)}
    expected = run_theirs(theirs, **columns)
    expected.loss.backward()
    step = EvalStep(ours, tuple(columns))

    def forward(*values):
        return step(*values)

    parameters = {parameter.name: parameter for parameter in ours.trainable_params()}
    weights = ms.ParameterTuple(parameters.values())
    function = ms.value_and_grad(forward, None, weights, has_aux=True)
    (loss, logits), gradients = function(*map(Tensor, columns.values()))
    assert absolute_error(logits, expected.logits) <= 1e-5 * float(expected.logits.abs().max())
    assert absolute_error(loss, expected.loss) <= 1e-5
    wanted = {
        key.replace("base_model.model.", ""): value.grad
        for key, value in theirs.named_parameters()
        if "adaption_" in key
    }
    assert set(wanted) == set(parameters)
    for key, gradient in zip(parameters, gradients, strict=True):
        scale = max(float(wanted[key].abs().max()), 1e-2)
        assert absolute_error(gradient, wanted[key]) <= 1e-4 * scale, key

    with ours.disable_adapter():
        bare = transformers.AutoModelForCausalLM.from_pretrained(
            tmp_path / "base", attn_implementation="eager"
        )
        plain = run_theirs(bare.eval(), **batch).logits
        assert absolute_error(run_ours(ours, **batch), plain) <= 1e-5 * float(plain.abs().max())
    ours.save_pretrained(tmp_path / "again")
    written = load_file(tmp_path / "again" / "adapter_model.safetensors")
    saved = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert written.keys() == saved.keys()
    assert all(torch.equal(written[key], saved[key]) for key in saved)
    read = peft.PeftModel.from_pretrained(bare, tmp_path / "again").eval()
    assert torch.equal(run_theirs(read, **batch).logits, run_theirs(theirs, **batch).logits)


@pytest.mark.usefixtures("graph_mode")
def test_training_curve_and_generation(tmp_path):
    ours, theirs = make_pair("llama", tmp_path)
    batch = make_texts(rows=1)
    _, found, expected = train_both(ours, theirs, [{**batch, "labels": labels_of(batch)}] * 20, 1e-2)
    assert np.abs(found - expected).max() <= 1e-3
    assert found[-1] < found[0]
    prompt = batch["input_ids"][:, :9]
    whole = ours.generate(prompt, max_new_tokens=8, eos_token_id=None).asnumpy()
    for count in range(9, 17, 7):
        logits = run_theirs(theirs, input_ids=whole[:, :count]).logits
        assert whole[0, count] == logits[0, -1].argmax()


@pytest.mark.usefixtures("pynative")
def test_lengths_do_not_mix(tmp_path):
    """An adapter with fewer tokens gets a slot of its own: zeros would be seen too."""
    first, theirs = make_pair("llama", tmp_path / "first")
    batch = make_texts(rows=1)
    expected = run_ours(first, **batch)
    _, shorter = make_pair("llama", tmp_path / "second", adapter_len=3)
    first.load_adapter(tmp_path / "second" / "adapter", "shorter")
    first.set_adapter("shorter")
    logits = run_theirs(shorter, **batch).logits
    assert absolute_error(run_ours(first, **batch), logits) <= 1e-5 * float(logits.abs().max())
    first.set_adapter("default")
    assert absolute_error(run_ours(first, **batch), expected) <= 1e-6
    assert theirs is not shorter


REFUSED = {
    "length": ({"adapter_len": 0}, "adapter_len must be a positive integer, not 0"),
    "layers": ({"adapter_layers": None}, "adapter_layers must be a positive integer, not None"),
    "too many": ({"adapter_layers": 3}, "adapter_layers is 3, but 2 cells are called 'self_attn'"),
    "names": ({"target_modules": ["self_attn"]}, "target_modules must be text"),
    "target": ({"target_modules": "mlp"}, "'model.layers.0.mlp' is no attention of a decoder"),
}


@pytest.mark.parametrize(("changes", "message"), REFUSED.values(), ids=REFUSED)
def test_refused(tmp_path, changes, message):
    make_decoder("llama", tmp_path)
    with pytest.raises(InputError, match=message):
        get_peft_model(
            AutoModelForCausalLM.from_pretrained(tmp_path), AdaptionPromptConfig(**{**OPTIONS, **changes})
        )


def test_other_models_and_merging(tmp_path):
    make_decoder("bloom", tmp_path / "bloom")
    with pytest.raises(InputError, match="is for models of type llama, mistral, gpt2, not bloom"):
        get_peft_model(
            AutoModelForCausalLM.from_pretrained(tmp_path / "bloom"), AdaptionPromptConfig(**OPTIONS)
        )
    ours, _ = make_pair("llama", tmp_path)
    with pytest.raises(InputError, match="can't be merged"):
        ours.merge_and_unload()
    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(tmp_path / "base"),
        [
            AdaptionPromptConfig(**OPTIONS),
            LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"]),
        ],
    )
    assert np.isfinite(run_ours(model, **make_texts()).asnumpy()).all()
