"""`mindpeft info` on adapter folders: what is injected where, from the files alone and from a model."""

from __future__ import annotations

import json

import pytest

from mindpeft import (
    BitFitConfig,
    BottleneckConfig,
    LoraConfig,
    PeftModel,
    PromptTuningConfig,
    VeraConfig,
    get_peft_model,
)
from mindpeft.cli.injected import from_files, from_model
from mindpeft.models import AutoModel, AutoModelForSequenceClassification
from mindpeft.models.bert import BertConfig, BertModel

pytestmark = pytest.mark.usefixtures("pynative")

SELF = "encoder.layer.[0-1].attention.self"
LORA = {"task_type": "SEQ_CLS", "r": 4}
CONFIGS = {
    "lora": LoraConfig(target_modules=["query", "value"], bias="lora_only", **LORA),
    "all_biases": LoraConfig(target_modules=["query"], bias="all", **LORA),
    "ranks": LoraConfig(target_modules="all-linear", rank_pattern={"layer.1.attention.self.key": 2}, **LORA),
    "regex": LoraConfig(target_modules=r".*\.(query|word_embeddings)", **LORA),
    "vera": VeraConfig(target_modules=["query"], r=4, task_type="SEQ_CLS"),
    "prompt": PromptTuningConfig(num_virtual_tokens=3, task_type="SEQ_CLS"),
    "bottleneck": BottleneckConfig(task_type="SEQ_CLS"),
    "bitfit": BitFitConfig(task_type="SEQ_CLS"),
    "hybrid": [LoraConfig(target_modules=["query"], **LORA), LoraConfig(target_modules=["query"], r=2)],
}


def rows(found):
    return [injection.row() for injection in found]


def saved(tiny_bert, folder, config):
    base = AutoModelForSequenceClassification.from_pretrained(tiny_bert)
    get_peft_model(base, config).save_pretrained(folder)
    return folder


def test_a_lora_adapter_of_24_layers_has_few_lines(tmp_path):
    base = BertConfig(
        vocab_size=50, hidden_size=8, num_hidden_layers=24, num_attention_heads=2, intermediate_size=8
    )
    model = get_peft_model(BertModel.from_config(base), LoraConfig(target_modules=["query", "value"], r=2))
    model.save_pretrained(tmp_path)
    query, value = rows(from_files(tmp_path))
    tensors = {"lora_A.weight": [2, 8], "lora_B.weight": [8, 2]}
    place = "encoder.layer.[0-23].attention.self."
    assert query == {
        "place": f"{place}query",
        "places": 24,
        "kind": "LORA",
        "tensors": tensors,
        "parameters": 24 * 32,
    }
    assert value["place"] == f"{place}value"
    found = rows(from_model(model))
    assert [(row["place"], row["kind"], row["tensors"]) for row in found] == [
        (row["place"], "LoraLinear", tensors) for row in (query, value)
    ]


def test_parts_of_a_hybrid_have_lines_of_their_own(tiny_bert, tmp_path):
    same = LoraConfig(target_modules=["query"], r=4)
    found = rows(from_files(saved(tiny_bert, tmp_path, [same, same, BitFitConfig()])))
    lora = [row for row in found if row["kind"] == "LORA"]
    assert [row["places"] for row in lora] == [2, 2]
    assert lora[0]["place"] == lora[1]["place"] == f"bert.{SELF}.query"
    biases = {row["place"]: row for row in found if row["kind"] == "selected"}
    assert biases[f"bert.{SELF}.query"]["tensors"] == {"bias": [32]}


def test_layers_that_differ_have_lines_of_their_own(tiny_bert, tmp_path):
    found = {row["place"]: row for row in rows(from_files(saved(tiny_bert, tmp_path, CONFIGS["ranks"])))}
    assert found[f"bert.{SELF}.query"]["places"] == 2
    for layer, rank in ((0, 4), (1, 2)):
        row = found[f"bert.encoder.layer.{layer}.attention.self.key"]
        assert row["tensors"] == {"lora_A.weight": [rank, 32], "lora_B.weight": [32, rank]}
        assert row["parameters"] == 64 * rank
    assert found["classifier"] == {
        "place": "classifier",
        "places": 1,
        "kind": "saved",
        "tensors": {"bias": [2], "weight": [2, 32]},
        "parameters": 66,
    }


@pytest.mark.parametrize("name", CONFIGS)
def test_the_files_and_the_model_say_the_same(tiny_bert, tmp_path, name):
    folder = saved(tiny_bert, tmp_path, CONFIGS[name])
    files = from_files(folder)
    model = from_model(
        PeftModel.from_pretrained(AutoModelForSequenceClassification.from_pretrained(tiny_bert), folder)
    )

    def places(found):
        """Place -> how many, saved or selected, shapes of tensors in places of that name."""
        result = {}
        for injection in found:
            kind = injection.kind if injection.kind in ("saved", "selected") else "method"
            entry = (injection.places, kind, sorted(shape for _, shape in injection.tensors))
            result.setdefault(injection.place, []).append(entry)
        return {place: sorted(entries) for place, entries in result.items()}

    assert sum(row["parameters"] for row in rows(files)) == sum(row["parameters"] for row in rows(model))
    if name not in ("bottleneck", "hybrid"):  # without target_modules a projection is a place of its own
        assert places(files) == places(model)


def test_the_command(cli, tiny_bert, tmp_path):
    folder = saved(tiny_bert, tmp_path, CONFIGS["lora"])
    text = cli("info", folder).stdout
    assert "lora_A.weight 4x32" in text
    facts = json.loads(cli("info", folder, "--json").stdout)
    assert sum(row["parameters"] for row in facts["injected"]) == facts["parameters"]
    placed = json.loads(cli("info", folder, "--base", tiny_bert, "--json").stdout)["injected"]
    assert {row["kind"] for row in placed} == {"LoraLinear", "selected", "saved"}
    assert "LoraLinear" in cli("info", folder, "--base", tiny_bert).stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (lambda adapter, base: [adapter, "--base", adapter], "no config.json"),
        (lambda adapter, base: [base, "--base", base], "--base is for an adapter, and"),
        (lambda adapter, base: ["--env", "--base", base], "--base is for an adapter, and --env is none"),
        (lambda adapter, base: [adapter, "--base", "/nowhere"], "/nowhere"),
    ],
)
def test_refusals(cli, tiny_bert, tmp_path, arguments, message):
    folder = saved(tiny_bert, tmp_path, CONFIGS["lora"])
    result = cli("info", *arguments(folder, tiny_bert))
    assert result.exit_code != 0
    assert message in result.stderr.replace("\n", " ")


def test_an_adapter_for_another_base_is_refused(cli, tiny_bert, tmp_path):
    base = BertConfig(
        vocab_size=50, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8
    )
    model = BertModel.from_config(base)
    model.save_pretrained(tmp_path / "other")
    get_peft_model(model, LoraConfig(target_modules=["query"])).save_pretrained(tmp_path / "adapter")
    assert AutoModel.from_pretrained(tmp_path / "other").get_parameters()
    result = cli("info", tmp_path / "adapter", "--base", tiny_bert)
    assert result.exit_code != 0
    assert "does not fit this model" in result.stderr
