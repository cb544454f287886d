from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import yaml

from mindpeft.recipe import load_recipe


def test_a_run_folder_holds_everything(finished_run: Path):
    names = {path.name for path in finished_run.iterdir()}
    assert names >= {
        "adapter_config.json",
        "adapter_model.safetensors",
        "curves.png",
        "labels.json",
        "metrics.json",
        "recipe.yaml",
        "tokenizer.json",
        "train_log.jsonl",
    }
    assert json.loads((finished_run / "labels.json").read_text())["id2label"] == {
        "0": "food",
        "1": "sport",
        "2": "weather",
    }
    metrics = json.loads((finished_run / "metrics.json").read_text())
    assert 0 <= metrics["test"]["test_accuracy"] <= 1
    assert len((finished_run / "train_log.jsonl").read_text().splitlines()) >= 1


def test_the_resolved_recipe_is_written_and_reads_back(finished_run: Path, tiny_bert: Path):
    recipe = load_recipe(finished_run / "recipe.yaml")
    assert recipe.model.path == str(tiny_bert)
    assert recipe.train["learning_rate"] == 5e-3
    assert recipe.train["adam_beta2"] == 0.999  # a default, written down
    assert yaml.safe_load((finished_run / "recipe.yaml").read_text())["peft"]["r"] == 4


def test_peft_opens_the_run_folder_and_agrees(finished_run: Path, tiny_bert: Path):
    torch = pytest.importorskip("torch")
    import peft
    import transformers

    from mindpeft.cli.run_folder import open_run

    base = transformers.AutoModelForSequenceClassification.from_pretrained(tiny_bert, num_labels=3)
    theirs = peft.PeftModel.from_pretrained(base, finished_run).eval()
    run = open_run(finished_run)
    row = run.tokenizer()("the rain is wind good")
    with torch.no_grad():
        expected = theirs(**{name: torch.tensor([ids]) for name, ids in row.items()}).logits.numpy()

    import mindspore as ms

    found = run.model(**{name: ms.Tensor([ids], ms.int32) for name, ids in row.items()}).asnumpy()
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_an_adapter_that_begins_with_the_data(tiny_bert: Path, data_dir: Path, cli, tmp_path: Path):
    """EVA in a recipe: ranks shared out anew are in the folder, which opens again."""
    from tests.cli.conftest import write_recipe

    sections = {"peft": "  init_lora_weights: eva\n  eva_config: {rho: 1.5, tau: 0.9}\n"}
    recipe = write_recipe(tmp_path / "r.yaml", tiny_bert, data_dir, tmp_path / "out", **sections)
    result = cli("train", recipe, "train.num_train_epochs=1")
    assert result.exit_code == 0, result.stderr
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert config["init_lora_weights"] == "eva"
    assert config["eva_config"]["rho"] == 1.5
    assert sum({**dict.fromkeys(config["target_modules"], 4), **config["rank_pattern"]}.values()) == 16
    assert cli("eval", tmp_path / "out", "--data", data_dir / "test.csv").exit_code == 0
