"""The config: PEFT's keys and defaults, its file, and every mistake by name."""

from __future__ import annotations

import json
import logging

import peft
import pytest

from mindpeft import LoraConfig, PeftConfig, TaskType
from mindpeft.errors import InputError

EXAMPLES = [
    {},
    {"r": 4, "lora_alpha": 16, "target_modules": ["b", "a"], "task_type": "SEQ_CLS"},
    {"target_modules": "all-linear", "bias": "all", "use_rslora": True},
    {"target_modules": r".*\.q", "exclude_modules": ["z", "y"], "modules_to_save": ["head"]},
    {"target_modules": ["q"], "layers_to_transform": [1, 2], "layers_pattern": "layer", "lora_dropout": 0.1},
    {
        "rank_pattern": {"q": 2},
        "alpha_pattern": {"q": 3},
        "init_lora_weights": "gaussian",
        "revision": "main",
    },
    {"lora_bias": True, "init_lora_weights": False, "fan_in_fan_out": True},
]


def written(config, folder):
    config.save_pretrained(folder)
    values = json.loads((folder / "adapter_config.json").read_text())
    for key in ("target_modules", "exclude_modules"):
        if isinstance(values[key], list):
            values[key] = sorted(values[key])
    return values


@pytest.mark.parametrize("options", EXAMPLES, ids=str)
def test_file_equals_pefts(tmp_path, options):
    theirs = peft.LoraConfig(**options)
    theirs.inference_mode = True  # as PeftModel.save_pretrained sets it
    expected = written(theirs, tmp_path / "theirs")
    found = written(LoraConfig(**options), tmp_path / "ours")
    heads = found.pop("modules_to_save") or []
    assert set(heads) >= set(expected.pop("modules_to_save") or [])
    assert found == expected


@pytest.mark.parametrize("options", EXAMPLES, ids=str)
def test_round_trip_and_peft_reads_it(tmp_path, options):
    config = LoraConfig(**options)
    config.save_pretrained(tmp_path)
    again = PeftConfig.from_pretrained(tmp_path)
    assert isinstance(again, LoraConfig)
    assert again.to_dict() == {**config.to_dict(), "inference_mode": True}
    theirs = peft.PeftConfig.from_pretrained(tmp_path)
    assert theirs.r == config.r
    assert theirs.target_modules == config.target_modules


def test_file_layout(tmp_path):
    LoraConfig(target_modules=["v", "k", "q"]).save_pretrained(tmp_path)
    text = (tmp_path / "adapter_config.json").read_text()
    values = json.loads(text)
    assert list(values) == sorted(values)
    assert values["target_modules"] == ["k", "q", "v"]
    assert '\n  "alora' in text
    assert values["peft_type"] == "LORA"


def test_only_peft_type_is_required(tmp_path):
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    config = PeftConfig.from_pretrained(tmp_path)
    assert config.to_dict() == {**LoraConfig().to_dict(), "inference_mode": False}


def test_unknown_keys_are_dropped_and_named(tmp_path, caplog):
    values = {"peft_type": "LORA", "r": 3, "shiny_new_key": 1, "other": None, "runtime_config": {"a": 1}}
    (tmp_path / "adapter_config.json").write_text(json.dumps(values))
    with caplog.at_level(logging.WARNING, "mindpeft"):
        assert PeftConfig.from_pretrained(tmp_path).r == 3
    assert "unknown keys ignored: other, shiny_new_key" in caplog.text


@pytest.mark.parametrize(
    ("task", "given", "heads"),
    [
        ("SEQ_CLS", None, ["classifier", "score"]),
        ("TOKEN_CLS", ["classifier", "pooler"], ["classifier", "pooler", "score"]),
        ("QUESTION_ANS", None, ["qa_outputs"]),
        ("CAUSAL_LM", None, None),
        (TaskType.FEATURE_EXTRACTION, ["x"], ["x"]),
    ],
)
def test_task_heads(task, given, heads):
    assert LoraConfig(task_type=task, modules_to_save=given).modules_to_save == heads


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"r": 0}, "r must be a positive integer, not 0"),
        ({"r": 2.5}, "r must be a positive integer, not 2.5"),
        ({"rank_pattern": {"q": -1}}, r"rank_pattern\['q'\] must be a positive integer, not -1"),
        ({"lora_alpha": "x"}, "lora_alpha must be a number, not 'x'"),
        ({"lora_dropout": 1.0}, r"lora_dropout must lie in \[0, 1\), not 1.0"),
        ({"bias": "lora"}, "bias must be one of none, all, lora_only, not 'lora'; did you mean 'lora_only'?"),
        ({"task_type": "SEQ_CLASS"}, "unknown task_type 'SEQ_CLASS'; did you mean 'SEQ_CLS'?"),
        ({"init_lora_weights": "pisa"}, "init_lora_weights='pisa' is not supported; did you mean 'pissa'"),
        ({"init_lora_weights": "loftq"}, '"loftq" needs loftq_config'),
        ({"init_lora_weights": "pissa_niter_"}, "init_lora_weights='pissa_niter_' is not supported"),
        ({"init_lora_weights": "olora", "lora_bias": True}, "lora_bias needs init_lora_weights true or fa"),
        ({"use_dora": True, "lora_bias": True}, "lora_bias and use_dora can't be used together"),
        ({"layers_pattern": "layer", "target_modules": ["q"]}, "layers_pattern needs layers_to_transform"),
        ({"layers_to_transform": [1], "target_modules": "q"}, "layers_to_transform can't be used when"),
        ({"layers_pattern": "l", "target_modules": "q"}, "layers_pattern can't be used when"),
        ({"layers_to_transform": ["1"]}, "layers_to_transform must be an integer or a list"),
        ({"target_modules": 3}, "target_modules must be a list of names or a regular expression, not 3"),
        ({"modules_to_save": "classifier"}, "modules_to_save must be a list of names, not 'classifier'"),
        ({"use_qalora": True}, "use_qalora=True"),
        ({"alora_invocation_tokens": [1]}, r"alora_invocation_tokens=\[1\]"),
        ({"arrow_config": {"top_k": 1}}, "arrow_config="),
        ({"target_parameters": "w"}, "target_parameters must be a list of names"),
        ({"layer_replication": [[0, 1]]}, "layer_replication="),
        ({"megatron_config": {"a": 1}}, "megatron_config="),
        ({"eva_config": {"rho": 2.0}}, "eva_config="),
        ({"ensure_weight_tying": True}, "ensure_weight_tying=True"),
    ],
    ids=str,
)
def test_mistakes_are_named(tmp_path, options, message):
    with pytest.raises(InputError, match=message) as error:
        LoraConfig(**options)
    assert "\n" not in str(error.value)
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", **options}))
    with pytest.raises(InputError, match=message) as error:
        PeftConfig.from_pretrained(tmp_path)
    assert str(error.value).startswith(str(tmp_path))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "no such file"),
        ("{", "not valid JSON"),
        ("[]", "must hold a JSON object"),
        ("{}", "the key 'peft_type' is missing"),
        ('{"peft_type": "LORRA"}', "unknown peft_type 'LORRA'; did you mean 'LORA'?"),
        (
            '{"peft_type": "XLORA"}',
            "the method XLORA is not supported; supported: .*LORA",
        ),
    ],
)
def test_bad_files(tmp_path, text, message):
    if text is not None:
        (tmp_path / "adapter_config.json").write_text(text)
    with pytest.raises(InputError, match=message):
        PeftConfig.from_pretrained(tmp_path)


def test_missing_folder(tmp_path):
    with pytest.raises(InputError, match="no such adapter folder"):
        PeftConfig.from_pretrained(tmp_path / "nowhere")


def test_the_base_class_is_no_config():
    with pytest.raises(InputError, match="PeftConfig is the base"):
        PeftConfig()
