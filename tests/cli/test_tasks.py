"""Each task from its file to its answers, on the smallest data."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.cli.conftest import topic_rows, write_csv, write_recipe


@pytest.fixture
def run_task(cli, tiny_bert, data_dir, tmp_path):
    """Train on rows with a header, and return the run's folder and the file of the rows."""

    def run(rows: list[tuple[str, ...]], header: tuple[str, ...], *overrides: str) -> tuple[Path, Path]:
        train = write_csv(tmp_path / "rows.csv", rows, header)
        recipe = write_recipe(tmp_path / "recipe.yaml", tiny_bert, data_dir, tmp_path / "run")
        settings = [f"data.train={train}", f"data.test={train}", "train.max_steps=3", *overrides]
        result = cli("train", recipe, *settings)
        assert result.exit_code == 0, result.stderr
        return tmp_path / "run", train

    return run


def answer(cli, run: Path, *arguments: object) -> dict:
    result = cli("predict", run, *arguments)
    assert result.exit_code == 0, result.stderr
    (line,) = result.stdout.splitlines()
    return json.loads(line)


def measured(cli, run: Path, data: Path) -> dict:
    result = cli("eval", run, "--data", data, "--json")
    assert result.exit_code == 0, result.stderr
    found = json.loads(result.stdout)
    written = json.loads((run / "metrics.json").read_text())["test"]
    for name in found.keys() - {"rows", "runtime", "samples_per_second"}:
        assert found[name] == pytest.approx(written[f"test_{name}"], abs=1e-4)
    return found


def test_pairs_of_texts(cli, run_task):
    rows = [(first, second, str(int(a == b))) for first, a in topic_rows(5) for second, b in topic_rows(4)]
    run, data = run_task(
        rows, ("first", "second", "same"), "data.text=first", "data.text_pair=second", "data.label=same"
    )
    assert "accuracy" in measured(cli, run, data)
    found = answer(cli, run, "the rain is wind good", "--pair", "the goal is ball good")
    assert found["text_pair"] == "the goal is ball good"
    assert found["label"] in ("0", "1")
    alone = cli("predict", run, "the rain is wind good")
    assert alone.exit_code == 2
    assert "--pair" in alone.stderr
    table = cli("predict", run, "--file", data)
    assert len(table.stdout.splitlines()) == 20


def test_several_labels(cli, run_task):
    rows = [
        (text, f"{label}|good" if number % 2 else "") for number, (text, label) in enumerate(topic_rows(20))
    ]
    run, data = run_task(rows, ("text", "label"), "data.task=multi_label_classification")
    assert "f1_micro" in measured(cli, run, data)
    found = answer(cli, run, "the rain is wind good", "--top-k", 4)
    assert set(found["scores"]) == {"food", "good", "sport", "weather"}
    assert all(found["scores"][name] > 0.5 for name in found["labels"])


def test_regression(cli, run_task):
    rows = [(text, str(number / 10)) for number, (text, _) in enumerate(topic_rows(20))]
    run, data = run_task(rows, ("text", "label"), "data.task=regression")
    assert not (run / "labels.json").exists()
    assert "mse" in measured(cli, run, data)
    assert isinstance(answer(cli, run, "the rain is wind good")["value"], float)


def test_a_tag_for_each_word(cli, run_task):
    rows = [(text, f"O {label} O {label} O") for text, label in topic_rows(20)]
    run, data = run_task(rows, ("text", "label"), "data.task=token_classification")
    assert "accuracy" in measured(cli, run, data)
    found = answer(cli, run, "the rainy is wind good xyz " + "good " * 20)
    assert [token["word"] for token in found["tokens"]][:4] == ["the", "rainy", "is", "wind"]
    assert len(found["tokens"]) == 26
    assert found["tokens"][5]["label"] in ("O", "food", "sport", "weather")
    assert found["tokens"][-1]["label"] is None  # cut: max_length is 16


def test_masked_words(cli, run_task):
    run, _ = run_task(topic_rows(20), ("text", "label"), "data.task=masked_lm")
    metrics = json.loads((run / "metrics.json").read_text())["test"]
    assert metrics["test_perplexity"] > 1
    refused = cli("predict", run, "the rain")
    assert refused.exit_code == 2
    assert "masked_lm" in refused.stderr


def test_part_of_the_training_rows_is_held_out(cli, tiny_bert, data_dir, tmp_path):
    recipe = write_recipe(tmp_path / "recipe.yaml", tiny_bert, data_dir, tmp_path / "run")
    arguments = [
        "data.eval_share=0.2",
        "train.max_steps=2",
        "train.eval_strategy=steps",
        "train.eval_steps=1",
    ]
    result = cli("train", recipe, *arguments)
    assert result.exit_code == 0, result.stderr
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert set(metrics) == {"train", "eval", "test"}
    logged = [json.loads(line) for line in (tmp_path / "run" / "train_log.jsonl").read_text().splitlines()]
    assert sum("eval_accuracy" in line for line in logged) == 3  # after each step, and at the end


def test_overwrite_replaces_an_earlier_run(cli, tiny_bert, data_dir, tmp_path):
    recipe = write_recipe(tmp_path / "recipe.yaml", tiny_bert, data_dir, tmp_path / "run")
    assert cli("train", recipe, "train.max_steps=1").exit_code == 0
    assert cli("train", recipe, "train.max_steps=1").exit_code == 2
    assert cli("train", recipe, "train.max_steps=2", "--overwrite").exit_code == 0
    assert [path.name for path in (tmp_path / "run").glob("checkpoint-*")] == ["checkpoint-2"]
