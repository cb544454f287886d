"""Target matching against PEFT: its own predicate, and full injections into a tiny transformers BERT."""

from __future__ import annotations

import logging
from types import SimpleNamespace

import peft
import pytest
import torch
import transformers
from peft.tuners.tuners_utils import _find_minimal_target_modules, check_target_module_exists
from peft.utils.constants import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
from peft.utils.other import get_pattern_key

from mindpeft import LoraConfig
from mindpeft.errors import InputError
from mindpeft.targets import (
    LORA_TARGETS,
    Match,
    condense,
    find_targets,
    match_name,
    output_head_names,
    pattern_value,
    resolve_targets,
    saved_modules,
)

CONFIGS = [
    {},
    {"target_modules": ["query"]},
    {"target_modules": ["query", "value", "key"]},
    {"target_modules": ["dense"]},
    {"target_modules": ["output.dense"]},
    {"target_modules": ["attention.output.dense"]},
    {"target_modules": ["bert.encoder.layer.1.attention.self.query"]},
    {"target_modules": ["bert.encoder.layer.1.attention.self.query", "value"], "layers_to_transform": [0]},
    {"target_modules": "all-linear"},
    {"target_modules": "ALL-LINEAR"},
    {"target_modules": "all-linear", "task_type": "SEQ_CLS"},
    {"target_modules": "all-linear", "exclude_modules": ["pooler.dense"]},
    {"target_modules": "all-linear", "exclude_modules": r".*layer\.0\..*"},
    {"target_modules": r".*\.(query|key)"},
    {"target_modules": r"bert\.encoder\.layer\.[02]\..*dense"},
    {"target_modules": r".*query", "exclude_modules": r".*layer\.1\..*"},
    {"target_modules": ["query"], "exclude_modules": ["layer.0.attention.self.query"]},
    {
        "target_modules": ["query", "dense"],
        "exclude_modules": ["attention.output.dense", "intermediate.dense"],
    },
    {"target_modules": ["query"], "layers_to_transform": 1},
    {"target_modules": ["query"], "layers_to_transform": [0, 2]},
    {"target_modules": ["dense"], "layers_to_transform": [1], "layers_pattern": "layer"},
    {"target_modules": ["dense"], "layers_to_transform": [1], "layers_pattern": ["blocks", "layer"]},
    {"target_modules": ["dense", "query"], "layers_to_transform": []},
    {"target_modules": ["dense"], "layers_to_transform": [0, 1], "layers_pattern": []},
    {"target_modules": ["word_embeddings"]},
    {"target_modules": ["word_embeddings", "query"]},
    {"target_modules": ["dense"], "modules_to_save": ["pooler"]},
    {"target_modules": ["query", "classifier"], "modules_to_save": ["classifier"]},
    {"target_modules": ["query", "classifier"], "task_type": "SEQ_CLS"},
    {"target_modules": ["query", "nothing"]},
    {"target_modules": ["self.query", "y"]},
    {"target_modules": r"(bert\.)?pooler\.dense|classifier"},
    {"target_modules": ["classifier"]},
    {"target_modules": ["query"], "layers_to_transform": [0], "exclude_modules": ["key"]},
]


def tiny_bert(kind=transformers.BertForSequenceClassification, layers=3):
    torch.manual_seed(0)
    return kind(
        transformers.BertConfig(
            vocab_size=30,
            hidden_size=8,
            num_hidden_layers=layers,
            num_attention_heads=2,
            intermediate_size=12,
        )
    )


def ours(model, options):
    """The names that a config means here, found on the torch model's names and classes."""
    config = LoraConfig(**options)
    cells = {name: module for name, module in model.named_modules() if name}

    def linear_names():
        linear = {name for name, module in cells.items() if isinstance(module, torch.nn.Linear)}
        return linear - output_head_names(model, cells, config.task_type)

    config.target_modules = resolve_targets(config, cells, linear_names, model.config.model_type)
    return find_targets(config, cells), config.target_modules


@pytest.mark.parametrize("options", CONFIGS, ids=str)
def test_injects_where_peft_does(options):
    theirs = peft.get_peft_model(tiny_bert(), peft.LoraConfig(**options))
    names, targets = ours(tiny_bert(), options)
    assert names == theirs.base_model.targeted_module_names
    saved = theirs.peft_config["default"].target_modules
    assert targets == (set(saved) if isinstance(saved, set | list) else saved)


@pytest.mark.parametrize(
    "kind", ["BertForMaskedLM", "BertModel", "BertForTokenClassification", "BertForQuestionAnswering"]
)
def test_all_linear_leaves_the_output_head_out(kind):
    make = getattr(transformers, kind)
    for layers in (1, 4):  # few names are spelled out, many are condensed
        theirs = peft.get_peft_model(tiny_bert(make, layers), peft.LoraConfig(target_modules="all-linear"))
        names, targets = ours(tiny_bert(make, layers), {"target_modules": "all-linear"})
        assert names == theirs.base_model.targeted_module_names
        assert targets == set(theirs.peft_config["default"].target_modules)


NAMES = [
    "model.layers.0.self_attn.q_proj",
    "model.layers.11.mlp.experts.3.up_proj",
    "model.decoder.block.2.layer.1.EncDecAttention.q",
    "layers.4.q_proj",
    "transformer.h.7.attn.c_attn",
    "q_proj",
    "lm_head",
    "model.my_q_proj",
    "score.dense",
    "underscore",
]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    "targets", [["q_proj"], ["q"], ["c_attn", "up_proj"], r".*_proj", ["score", "dense"], ["q_.*"]]
)
@pytest.mark.parametrize(
    "more",
    [
        {},
        {"exclude_modules": ["layers.0.self_attn.q_proj", "q"]},
        {"modules_to_save": ["score", "lm_head"]},
        {"layers_to_transform": [0, 7, 11]},
        {"layers_to_transform": 2, "layers_pattern": ["block", "h"]},
        {"layers_to_transform": [3, 11], "layers_pattern": "experts"},
        {"layers_to_transform": [1], "layers_pattern": "layer"},
    ],
    ids=str,
)
def test_predicate_equals_pefts(name, targets, more):
    base = {
        "exclude_modules": None,
        "modules_to_save": None,
        "layers_to_transform": None,
        "layers_pattern": None,
    }
    config = SimpleNamespace(**{**base, **more}, target_modules=targets, target_parameters=None)
    theirs = check_target_module_exists(config, name)
    excluded = type(theirs).__name__ == "_ExcludedModule"
    expected = Match.EXCLUDED if excluded else Match.TARGET if theirs else Match.NONE
    assert match_name(config, name) is expected


@pytest.mark.parametrize(
    "patterns", [{"q": 1, "q_proj": 2}, {r"layers\.\d+.*q_proj": 3}, {"proj": 4}, {".*_proj": 5}, {}]
)
@pytest.mark.parametrize("name", NAMES)
def test_patterns_equal_pefts(patterns, name):
    assert pattern_value(patterns, name, 9) == patterns.get(get_pattern_key(patterns.keys(), name), 9)


def test_default_targets_are_pefts():
    assert LORA_TARGETS == TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING


def test_condensed_targets_are_pefts():
    names = [f"m.layers.{i}.{part}" for i in range(12) for part in ("a.q", "a.k", "b.q", "b.o", "norm")]
    for chosen in (("a.q", "a.k"), ("a.q", "b.o"), ("b.q",), ("a.q", "b.q", "norm")):
        targets = {name for name in names if name.endswith(chosen)}
        assert condense(targets, names) == _find_minimal_target_modules(targets, set(names) - targets)


def test_saved_modules_end_with_an_entry_as_in_peft():
    names = ["bert.pooler", "bert.pooler.dense", "classifier", "my_classifier", "classifier.dense"]
    assert saved_modules(SimpleNamespace(modules_to_save=["classifier", "score"]), names) == [
        "classifier",
        "my_classifier",
    ]
    assert saved_modules(SimpleNamespace(modules_to_save=None), names) == []


def test_no_match_shows_real_names_and_the_nearest():
    with pytest.raises(InputError) as error:
        ours(tiny_bert(), {"target_modules": ["querry"]})
    message = str(error.value)
    assert "no cell matches target_modules querry" in message
    assert "'bert.encoder.layer.0.attention.self.query'" in message
    assert message.endswith("did you mean 'query'?")
    assert "\n" not in message


def test_no_match_names_what_narrowed_the_search():
    with pytest.raises(InputError, match=r"\(with exclude_modules='\.\*', layers_to_transform=\[9\]\)"):
        ours(tiny_bert(), {"target_modules": ["query"], "exclude_modules": ".*", "layers_to_transform": [9]})


def test_no_default_for_a_model_type():
    model = tiny_bert()
    model.config.model_type = "mystery"
    with pytest.raises(
        InputError, match="no default for model_type 'mystery'; name some cells, such as 'bert"
    ):
        ours(model, {})


def test_a_bad_pattern_is_an_input_error():
    with pytest.raises(InputError, match="not a regular expression"):
        ours(tiny_bert(), {"target_modules": "(query"})


def test_idle_entries_are_named(caplog):
    with caplog.at_level(logging.WARNING, "mindpeft"):
        ours(
            tiny_bert(),
            {"target_modules": ["query", "valeu"], "exclude_modules": ["zip"], "rank_pattern": {"q": 3}},
        )
    assert "target_modules that matched no cell: valeu" in caplog.text
    assert "exclude_modules excluded no cell" in caplog.text
    assert "rank_pattern keys that matched no targeted cell: q" in caplog.text
