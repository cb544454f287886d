"""Models whose linear layers are int8, against the same models opened with the rounded weights."""

from __future__ import annotations

import mindspore as ms
import numpy as np
import pytest
import torch
import transformers

from mindpeft import (
    BitFitConfig,
    FullConfig,
    LoraConfig,
    MissConfig,
    PeftModel,
    get_peft_model,
)
from mindpeft.errors import InputError
from mindpeft.generate import generate
from mindpeft.models import AutoModelForCausalLM
from mindpeft.nn.int8 import Int8Linear
from mindpeft.ops.cpu import kernels_on
from mindpeft.precision import computing_dtype
from mindpeft.recipe_sections import ModelSection
from mindpeft.train.optim import AdamW
from mindpeft.train.runner import StepRunner
from tests.models.decoders import labels_of, make_decoder, make_texts
from tests.models.reference import make_reference, open_ours, relative_error, run_ours, run_theirs

pytestmark = [
    pytest.mark.usefixtures("graph_mode"),
    pytest.mark.skipif(not kernels_on(), reason="no kernels here"),
]


def layers(model) -> set[str]:
    """Where the layers of int8 are."""
    return {path for path, cell in model.cells_and_names() if isinstance(cell, Int8Linear)}


def lora(**options) -> LoraConfig:
    return LoraConfig(task_type="CAUSAL_LM", r=4, lora_alpha=8, target_modules="all-linear", **options)


@pytest.fixture
def llama(tmp_path):
    """One of int8, and the folder of another with the numbers that it stands for."""
    make_decoder("llama", tmp_path / "base")
    ours = AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype="int8")
    ours.save_pretrained(tmp_path / "rounded")
    return ours, tmp_path / "rounded"


def test_linear_layers_of_the_backbone_are_int8(llama):
    ours, _ = llama
    assert len(layers(ours)) == 2 * 7
    assert all(path.startswith("model.layers") for path in layers(ours))
    assert ours.lm_head.weight.dtype == ours.get_input_embeddings().weight.dtype == ms.bfloat16
    assert computing_dtype(ours) == ms.float32
    names = [parameter.name for parameter in ours.get_parameters()]
    assert len(set(names)) == len(names)
    assert {"model.layers.1.mlp.up_proj.weight", "model.layers.1.mlp.up_proj.scale"} <= set(names)
    assert not ours.load_report.newly_initialised


def test_a_fresh_head_is_float32(tmp_path):
    make_reference("features", tmp_path)
    ours = open_ours("sequence", tmp_path, dtype="int8")
    assert ours.classifier.weight.dtype == ms.float32
    assert "bert.encoder.layer.0.output.dense" in layers(ours)
    assert ours.load_report.newly_initialised == ["classifier.weight", "classifier.bias"]


@pytest.mark.parametrize("name", ["llama_biases", "bloom", "gpt_neox", "opt", "phi3"])
def test_decoders(name, tmp_path):
    theirs, batch = make_decoder(name, tmp_path), make_texts()
    ours = AutoModelForCausalLM.from_pretrained(tmp_path, dtype="int8")
    assert layers(ours)
    assert relative_error(run_ours(ours, **batch), run_theirs(theirs, **batch).logits) < 0.15


def test_saved_for_transformers(llama):
    """What is written is float32, under Hugging Face's names alone."""
    ours, folder = llama
    theirs, report = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, output_loading_info=True
    )
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    layer = ours.model.layers[0].mlp.up_proj
    np.testing.assert_array_equal(theirs.model.layers[0].mlp.up_proj.weight.detach(), layer.read())
    assert transformers.AutoConfig.from_pretrained(folder).dtype == torch.float32
    texts = make_texts()
    assert relative_error(run_ours(ours, **texts), run_theirs(theirs, **texts).logits) < 5e-2


def test_opened_again_it_is_the_same(llama):
    ours, folder = llama
    again = AutoModelForCausalLM.from_pretrained(folder, dtype="int8")
    for path in layers(ours):
        first, second = (dict(model.cells_and_names())[path] for model in (ours, again))
        assert np.abs(first.weight.asnumpy().astype(int) - second.weight.asnumpy()).max() == 0
    ours.save_pretrained(folder, dtype="bfloat16")
    narrow = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
    assert {str(p.dtype) for p in narrow.get_parameters() if p.ndim == 2} == {"BFloat16"}


def test_generation(llama):
    """Eight rows and fewer are not rounded: prompts of 7 tokens give what float32 gives."""
    ours, folder = llama
    plain = AutoModelForCausalLM.from_pretrained(folder, dtype="float32")
    prompt = make_texts(7, 1)["input_ids"]
    found, expected = (generate(m, prompt, max_new_tokens=12, do_sample=False) for m in (ours, plain))
    np.testing.assert_array_equal(found, expected)


def losses_of(model, steps: int = 30) -> list[float]:
    """Of training on the same texts, over and over."""
    texts = make_texts()
    runner = StepRunner(model.set_train(), AdamW(model), 1, 1.0)
    batch = {**texts, "labels": labels_of(texts)}
    return [float(runner.train(batch, step, 5e-3)[0]) for step in range(1, steps + 1)]


def test_training_follows_float32(llama, tmp_path):
    ours, folder = llama
    plain = AutoModelForCausalLM.from_pretrained(folder, dtype="float32")
    get_peft_model(plain, lora()).save_pretrained(tmp_path / "start")
    plain = AutoModelForCausalLM.from_pretrained(folder, dtype="float32")
    cells = [cell for _, cell in ours.cells_and_names() if isinstance(cell, Int8Linear)]
    before = [cell.weight.asnumpy() for cell in cells]
    found, expected = (
        losses_of(PeftModel.from_pretrained(model, tmp_path / "start", is_trainable=True))
        for model in (ours, plain)
    )
    assert expected[-1] < 0.6 * expected[0]
    np.testing.assert_allclose(found, expected, rtol=3e-2)
    for cell, weight in zip(cells, before, strict=True):
        np.testing.assert_array_equal(cell.weight.asnumpy(), weight)


def test_training_with_recomputed_layers(llama):
    ours, _ = llama
    ours.gradient_checkpointing_enable()
    losses = losses_of(get_peft_model(ours, lora()), 10)
    assert losses[-1] < losses[0]


@pytest.mark.parametrize(
    "config",
    [
        lora(use_dora=True, init_lora_weights=False),
        pytest.param(
            MissConfig(task_type="CAUSAL_LM", r=4, target_modules="all-linear", init_weights="bat"),
            marks=pytest.mark.slow,
        ),
    ],
    ids=["dora", "miss_bat"],
)
def test_methods_that_look_at_the_weight(llama, config, tmp_path):
    ours, folder = llama
    plain = get_peft_model(AutoModelForCausalLM.from_pretrained(folder, dtype="float32"), config)
    plain.save_pretrained(tmp_path / "adapter")
    texts = make_texts(7, 1)
    wrapped = PeftModel.from_pretrained(ours, tmp_path / "adapter")
    assert relative_error(run_ours(wrapped, **texts), run_ours(plain, **texts)) < 2e-2
    fresh = get_peft_model(wrapped.unload(), config)
    losses = losses_of(fresh, 5)
    assert losses[-1] < losses[0]


def test_biases_can_be_trained(tmp_path):
    make_decoder("llama_biases", tmp_path)
    ours = AutoModelForCausalLM.from_pretrained(tmp_path, dtype="int8")
    losses = losses_of(get_peft_model(ours, BitFitConfig(task_type="CAUSAL_LM")), 5)
    assert losses[-1] < losses[0]


@pytest.mark.parametrize(
    "config",
    [
        FullConfig(target_modules=["q_proj"]),
        lora(init_lora_weights="pissa"),
        lora(modules_to_save=["up_proj"]),
        LoraConfig(target_parameters=["up_proj.weight"], r=4),
    ],
    ids=["full", "pissa", "modules_to_save", "target_parameters"],
)
def test_weights_cannot_be_changed(llama, config):
    with pytest.raises(InputError, match="int8; open the base model in float32 or bfloat16"):
        get_peft_model(llama[0], config)


def test_nothing_is_merged_into_them(llama):
    ours = get_peft_model(llama[0], lora(init_lora_weights=False))
    texts = make_texts()
    before = run_ours(ours, **texts)
    for merge in (ours.merge_adapter, ours.merge_and_unload):
        with pytest.raises(InputError, match=r"can't merge into .* which is int8; open the base model in"):
            merge()
    assert relative_error(run_ours(ours, **texts), before) == 0


def test_without_kernels(tmp_path, plain_operators):
    make_decoder("llama", tmp_path)
    with pytest.raises(InputError, match="int8 is for the CPU with mindpeft's kernels"):
        AutoModelForCausalLM.from_pretrained(tmp_path, dtype="int8")


def test_a_model_of_other_layers(tmp_path):
    make_decoder("gpt2", tmp_path)
    with pytest.raises(InputError, match="no linear layers that int8 is for"):
        AutoModelForCausalLM.from_pretrained(tmp_path, dtype="int8")


def test_recipe():
    assert ModelSection("folder", dtype="int8").dtype == "int8"
