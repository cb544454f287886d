"""LoRA against transformers + peft on BERT: logits, gradients, files in both directions, merging, numbers."""

from __future__ import annotations

import mindspore as ms
import numpy as np
import pytest
import torch
import transformers
from mindspore import Tensor

from mindpeft import LoraConfig, PeftModel, get_peft_model
from mindpeft.models import AutoModelForSequenceClassification
from tests.models import reference
from tests.models.reference import make_batch, make_reference, open_ours, run_ours, run_theirs
from tests.parity.adapters import (
    make_peft_model,
    open_in_peft,
    plain_name,
    randomise,
    trained_here,
    trained_in_peft,
)

# Each option of ordinary LoRA, as keys of the configuration.
OPTIONS = {
    "rank_and_alpha": {"r": 3, "lora_alpha": 7},
    "default_targets": {"r": 2},
    "rslora": {"use_rslora": True, "r": 4, "target_modules": ["query", "key"]},
    "bias_none": {"bias": "none", "target_modules": ["dense"]},
    "bias_all": {"bias": "all", "target_modules": ["query"]},
    "bias_lora_only": {"bias": "lora_only", "target_modules": ["query", "dense"]},
    "lora_bias": {"lora_bias": True, "target_modules": ["value", "dense"]},
    "patterns": {
        "target_modules": ["query", "value"],
        "rank_pattern": {"query": 2, r"layer\.1\..*value": 5},
        "alpha_pattern": {"layer.0.attention.self.query": 32},
    },
    "layers": {"target_modules": ["query", "value"], "layers_to_transform": [1]},
    "layers_pattern": {"target_modules": ["dense"], "layers_to_transform": 0, "layers_pattern": "layer"},
    "regex": {"target_modules": r".*\.layer\.[01]\.attention\.(self\.key|output\.dense)"},
    "all_linear": {"target_modules": "all-linear"},
    "all_linear_of_a_task": {"target_modules": "all-linear", "task_type": "SEQ_CLS"},
    "exclude": {"target_modules": "all-linear", "exclude_modules": ["pooler.dense", "key"]},
    "exclude_regex": {"target_modules": ["query", "dense"], "exclude_modules": r".*layer\.0.*"},
    "head_of_a_task": {"target_modules": ["query", "value"], "task_type": "SEQ_CLS"},
    "modules_to_save": {"target_modules": ["value"], "modules_to_save": ["classifier", "pooler"]},
    "saved_norms": {"target_modules": ["value"], "modules_to_save": ["LayerNorm"]},
    "embeddings": {"target_modules": ["word_embeddings", "token_type_embeddings"], "r": 4},
    "embedding_and_linear": {"target_modules": ["word_embeddings", "query"], "use_rslora": True},
    "fan_in_fan_out_false": {"target_modules": ["query"], "fan_in_fan_out": False},
    "gaussian": {"target_modules": ["query", "word_embeddings"], "init_lora_weights": "gaussian"},
    "random_init": {"target_modules": ["query"], "init_lora_weights": False},
    "dropout": {"target_modules": ["query"], "lora_dropout": 0.4},  # which acts while training only
}
IN_GRAPH_BY_DEFAULT = ("lora_bias", "embedding_and_linear")
LABELS = np.array([0, 3, 2], np.int32)


OPTIONS_AND_MODES = [
    *((name, "pynative") for name in OPTIONS),
    *(
        pytest.param(name, "graph", marks=() if name in IN_GRAPH_BY_DEFAULT else pytest.mark.slow)
        for name in OPTIONS
    ),
]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A folder with a tiny random BERT for sequence classification."""
    folder = tmp_path_factory.mktemp("tiny")
    make_reference("sequence", folder, num_labels=4)
    return folder


def open_theirs(folder):
    auto = transformers.AutoModelForSequenceClassification
    return auto.from_pretrained(folder, attn_implementation="eager").eval()


@pytest.mark.parametrize(("name", "mode"), OPTIONS_AND_MODES, indirect=["mode"])
def test_same_adapter_gives_same_logits_gradients_and_numbers(tiny, tmp_path, name, mode):
    theirs = make_peft_model(open_theirs(tiny), OPTIONS[name])
    theirs.save_pretrained(tmp_path)
    ours = PeftModel.from_pretrained(open_ours("sequence", tiny), tmp_path, is_trainable=True)
    assert_same_step(ours, theirs, make_batch(), LABELS)


def assert_same_step(ours, theirs, batch, labels):
    """Equal numbers of parameters, logits within 1e-5, gradients of all that is trained within 1e-4."""
    ours.set_train(False)  # no dropout
    assert ours.get_nb_trainable_parameters() == theirs.get_nb_trainable_parameters()
    out = run_theirs(theirs, **batch, labels=labels)
    out.loss.backward()
    expected = {name: value.grad for name, value in trained_in_peft(theirs).items()}

    parameters = trained_here(ours)
    assert parameters.keys() == expected.keys()
    (loss, logits), gradients = loss_and_gradients(ours, parameters.values(), batch, labels)
    assert reference.absolute_error(loss, out.loss) <= 1e-5
    assert reference.absolute_error(logits, out.logits) <= 1e-5
    largest = max(value.abs().max() for value in expected.values())
    for name, gradient in zip(parameters, gradients, strict=True):
        if expected[name].abs().max() <= 1e-6 * largest:  # zero but for rounding (a bias added to every key)
            assert np.abs(gradient.asnumpy()).max() <= 1e-5 * largest, name
        else:
            assert reference.relative_error(gradient, expected[name]) <= 1e-4, name


def loss_and_gradients(model, parameters, batch, labels):
    def forward(input_ids, attention_mask, token_type_ids, labels):
        return model(input_ids, attention_mask, token_type_ids, None, labels)

    function = ms.value_and_grad(forward, None, ms.ParameterTuple(parameters), has_aux=True)
    return function(*(Tensor(value) for value in (*batch.values(), labels)))


@pytest.mark.parametrize("name", OPTIONS)
def test_what_is_written_here_opens_in_peft(tiny, tmp_path, name):
    ms.set_seed(0)
    ours = get_peft_model(open_ours("sequence", tiny), LoraConfig(**OPTIONS[name])).set_train(False)
    randomise(ours)
    ours.save_pretrained(tmp_path)
    theirs = open_in_peft(open_theirs(tiny), tmp_path)
    found, expected = run_ours(ours, **make_batch()), run_theirs(theirs, **make_batch()).logits
    assert reference.absolute_error(found, expected) <= 1e-5
    bare = run_theirs(open_theirs(tiny), **make_batch()).logits
    assert (bare - expected).abs().max() > 1e-3  # the adapter does something


@pytest.mark.parametrize("name", OPTIONS)
def test_a_merged_checkpoint_opens_in_transformers(tiny, tmp_path, name):
    ms.set_seed(1)
    ours = get_peft_model(open_ours("sequence", tiny), LoraConfig(**OPTIONS[name])).set_train(False)
    randomise(ours)
    expected = run_ours(ours, **make_batch())
    ours.merge_and_unload().save_pretrained(tmp_path)
    theirs, info = transformers.AutoModelForSequenceClassification.from_pretrained(
        tmp_path, output_loading_info=True, attn_implementation="eager"
    )
    assert not any(info.values()), info
    assert reference.absolute_error(run_theirs(theirs.eval(), **make_batch()).logits, expected) <= 1e-5


@pytest.mark.parametrize("name", ["lora_bias", "modules_to_save", "embedding_and_linear"])
def test_merging_gives_pefts_weights(tiny, tmp_path, name):
    theirs = make_peft_model(open_theirs(tiny), OPTIONS[name])
    theirs.save_pretrained(tmp_path)
    ours = PeftModel.from_pretrained(open_ours("sequence", tiny), tmp_path).merge_and_unload()
    expected = theirs.merge_and_unload().state_dict()
    for key, parameter in ours.parameters_and_names():
        assert reference.absolute_error(parameter, expected[plain_name(key)]) <= 1e-6, key


@pytest.mark.parametrize("head", ["token", "answer", "masked", "features"])
def test_every_head_takes_an_adapter(tmp_path, head):
    base = make_reference(head, tmp_path / "base")
    task = {"token": "TOKEN_CLS", "answer": "QUESTION_ANS", "features": "FEATURE_EXTRACTION"}.get(head)
    theirs = make_peft_model(base, {"target_modules": ["query", "dense"], "task_type": task})
    theirs.save_pretrained(tmp_path / "adapter")
    ours = PeftModel.from_pretrained(
        open_ours(head, tmp_path / "base"), tmp_path / "adapter", is_trainable=True
    )
    assert ours.get_nb_trainable_parameters() == theirs.get_nb_trainable_parameters()
    found = run_ours(ours.set_train(False), **make_batch())
    # PEFT's own forward for question answering drops the token types, so the model inside is called.
    out = run_theirs(theirs.get_base_model(), **make_batch())
    if head == "answer":
        expected = torch.stack((out.start_logits, out.end_logits), -1)
    elif head == "features":
        found, expected = found[0], out.last_hidden_state
    else:
        expected = out.logits
    assert reference.absolute_error(found, expected) <= 1e-5


# MiniLM -----------------------------------------------------------------------------------------------------

MINILM_OPTIONS = {
    "query_value": {"r": 8, "lora_alpha": 16, "target_modules": ["query", "value"], "task_type": "SEQ_CLS"},
    "all_linear": {"r": 4, "use_rslora": True, "target_modules": "all-linear", "task_type": "SEQ_CLS"},
    "embeddings_and_biases": {
        "r": 4,
        "target_modules": ["word_embeddings", "dense"],
        "bias": "lora_only",
        "modules_to_save": ["classifier"],
    },
}
MINILM_MODES = [("query_value", "graph"), ("all_linear", "pynative"), ("embeddings_and_biases", "pynative")]


@pytest.fixture(scope="module")
def minilm(minilm_dir, tmp_path_factory):
    """A folder with MiniLM and a fresh head of four classes."""
    folder = tmp_path_factory.mktemp("minilm")
    torch.manual_seed(0)
    auto = transformers.AutoModelForSequenceClassification
    auto.from_pretrained(minilm_dir, num_labels=4).save_pretrained(folder)
    return folder


@pytest.mark.parametrize(("name", "mode"), MINILM_MODES, indirect=["mode"])
def test_minilm_logits_and_gradients(minilm, tmp_path, name, mode):
    theirs = make_peft_model(open_theirs(minilm), MINILM_OPTIONS[name])
    theirs.save_pretrained(tmp_path)
    base = AutoModelForSequenceClassification.from_pretrained(minilm)
    ours = PeftModel.from_pretrained(base, tmp_path, is_trainable=True)
    assert_same_step(ours, theirs, make_batch(length=19, types=2), LABELS)


@pytest.mark.parametrize("name", MINILM_OPTIONS)
def test_minilm_files_and_merging(minilm, tmp_path, name):
    base = AutoModelForSequenceClassification.from_pretrained(minilm)
    ours = get_peft_model(base, LoraConfig(**MINILM_OPTIONS[name])).set_train(False)
    randomise(ours)
    batch = make_batch(length=19, types=2)
    expected = run_ours(ours, **batch)
    ours.save_pretrained(tmp_path / "adapter")
    theirs = open_in_peft(open_theirs(minilm), tmp_path / "adapter")
    assert reference.absolute_error(run_theirs(theirs, **batch).logits, expected) <= 1e-5
    ours.merge_and_unload().save_pretrained(tmp_path / "merged")
    merged = open_theirs(tmp_path / "merged")
    assert reference.absolute_error(run_theirs(merged, **batch).logits, expected) <= 1e-5
