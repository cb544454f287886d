"""eval, merge, convert, info, lists and help on a finished run."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from mindpeft.convert.checkpoint import open_checkpoint


def test_eval_measures_what_training_measured(cli, finished_run: Path, data_dir: Path):
    result = cli("eval", finished_run, "--data", data_dir / "test.csv", "--json")
    assert result.exit_code == 0, result.stderr
    found = json.loads(result.stdout)
    written = json.loads((finished_run / "metrics.json").read_text())["test"]
    assert found["rows"] == 12
    assert found["accuracy"] == pytest.approx(written["test_accuracy"])
    assert found["loss"] == pytest.approx(written["test_loss"], abs=1e-4)


def test_eval_takes_the_recipes_own_data_and_prints_a_table(cli, finished_run):
    result = cli("eval", finished_run)
    assert result.exit_code == 0, result.stderr
    assert "accuracy" in result.stdout
    assert "\x1b" not in result.stdout


def test_merge_opens_in_transformers_and_answers_alike(cli, finished_run, tmp_path):
    torch = pytest.importorskip("torch")
    import transformers

    result = cli("merge", finished_run, "-o", tmp_path / "merged")
    assert result.exit_code == 0, result.stderr
    model = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged").eval()
    assert model.config.id2label == {0: "food", 1: "sport", 2: "weather"}
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "merged")
    with torch.no_grad():
        scores = (
            model(**tokenizer("the rain is wind good", return_tensors="pt")).logits.softmax(-1)[0].numpy()
        )
    for folder in (finished_run, tmp_path / "merged"):
        answer = json.loads(cli("predict", folder, "the rain is wind good", "--top-k", 3).stdout)
        found = [answer["scores"][name] for name in ("food", "sport", "weather")]
        np.testing.assert_allclose(found, scores, atol=1e-5)


def test_convert_keeps_every_bit_and_shards(cli, tiny_bert: Path, tmp_path):
    result = cli("convert", tiny_bert, tmp_path / "out", "--max-shard-size", "20KB")
    assert result.exit_code == 0, result.stderr
    assert (tmp_path / "out" / "model.safetensors.index.json").is_file()
    assert (tmp_path / "out" / "vocab.txt").read_text() == (tiny_bert / "vocab.txt").read_text()
    with open_checkpoint(tiny_bert) as before, open_checkpoint(tmp_path / "out") as after:
        assert set(before) == set(after)
        for name in before:
            np.testing.assert_array_equal(before[name].numpy(), after[name].numpy())


def test_info_of_a_checkpoint(cli, tiny_bert: Path):
    facts = json.loads(cli("info", tiny_bert, "--json").stdout)
    with open_checkpoint(tiny_bert) as checkpoint:
        assert facts["parameters"] == checkpoint.parameters
    assert facts["model_type"] == "bert"
    assert facts["architectures"] == ["BertForMaskedLM"]
    assert facts["dtype"] == "F32"
    assert facts["num_hidden_layers"] == 2


def test_info_of_an_adapter(cli, finished_run: Path, tiny_bert: Path):
    facts = json.loads(cli("info", finished_run, "--json").stdout)
    assert facts["method"] == "LORA"
    assert facts["target_modules"] == ["query", "value"]
    assert facts["r"] == 4
    assert facts["base_model"] == str(tiny_bert)
    assert facts["labels"] == ["food", "sport", "weather"]
    # 2 layers x 2 targets x (32 + 32) x 4, the fresh pooler, and the classifier
    assert facts["parameters"] == 2 * 2 * 64 * 4 + (32 * 32 + 32) + (32 * 3 + 3)
    assert "target modules" in cli("info", finished_run).stdout


def test_info_of_the_environment(cli):
    facts = json.loads(cli("info", "--env", "--json").stdout)
    assert "CPU" in facts["devices_present"]
    assert facts["mindspore"]


def test_lists(cli):
    assert cli("models").stdout.startswith("bert")
    assert "AutoModelForSequenceClassification" in cli("models").stdout.replace("\n", "")
    assert "\nlora " in cli("methods").stdout


def test_methods_of_a_base(cli, tiny_bert):
    result = cli("methods", "--base", tiny_bert)
    assert result.exit_code == 0, result.stderr
    rows = {line.split()[0]: line.split()[1:] for line in result.stdout.splitlines() if line.strip()}
    head = 2 * 32 + 2
    lora = 2 * 2 * 8 * (32 + 32)  # layers, query and value, rank 8
    assert rows["lora"][0] == f"{lora + head:,}"
    assert rows["lora"][2:] == ["yes", "yes"]
    assert float(rows["full"][1]) > 99  # all but the base's own head, which a trained copy replaces
    assert rows["prompt_tuning"][0] == f"{20 * 32 + head:,}"
    assert rows["prompt_tuning"][2] == "no"
    assert rows["bitfit"][3] == "no"
    assert cli("methods", "--base", tiny_bert, "--task", "masked").exit_code == 2
    assert cli("methods", "--base", "nowhere").exit_code == 2


@pytest.mark.parametrize(
    "command",
    [
        "quickstart",
        "train",
        "eval",
        "predict",
        "merge",
        "convert",
        "convert-adapter",
        "info",
        "models",
        "methods",
    ],
)
def test_every_command_shows_examples(cli, command):
    result = cli(command, "--help")
    assert result.exit_code == 0
    assert result.stdout.partition("Examples:")[2].count("  mindpeft ") >= 2
    assert "\b" not in result.stdout


def test_version(cli):
    result = cli("--version")
    assert result.exit_code == 0
    assert result.stdout.startswith("mindpeft ")
