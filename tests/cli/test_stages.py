"""Hybrids and stages in recipes, from training to answers."""

from __future__ import annotations

import json
import re
import shutil

import pytest
import yaml
from safetensors.numpy import load_file

from mindpeft.recipe import load_recipe
from tests.cli.conftest import snapshot, write_recipe

LORA = {"method": "lora", "r": 4, "target_modules": ["query", "value"]}
LAST_LAYER = {"method": "full", "target_modules": ["bert.encoder.layer.1"]}
STAGES = [
    {"peft": LORA, "train": {"max_steps": 3}},
    {"peft": LAST_LAYER, "train": {"max_steps": 2, "learning_rate": 1e-3}},
]


@pytest.fixture
def recipe(tiny_bert, data_dir, tmp_path):
    """Write a recipe with these sections in place of ``peft``, and return its path."""

    def write(**sections):
        path = write_recipe(tmp_path / "recipe.yaml", tiny_bert, data_dir, tmp_path / "run")
        values = yaml.safe_load(path.read_text())
        del values["peft"]
        path.write_text(yaml.safe_dump({**values, **sections}))
        return path

    return write


def test_a_hybrid_recipe(cli, recipe, tmp_path):
    result = cli("train", recipe(peft=[LORA, {"method": "bitfit"}]), "train.max_steps=3")
    assert result.exit_code == 0, result.stderr
    run = tmp_path / "run"
    assert json.loads((run / "hybrid.json").read_text())["parts"] == ["0-lora", "1-bitfit"]
    assert "LORA + BITFIT" in cli("info", run).stdout
    question = ("the rain is wind good", "--top-k", 3)
    answer = cli("predict", run, *question)
    assert answer.exit_code == 0, answer.stderr
    merged = cli("merge", run, "-o", tmp_path / "merged")
    assert merged.exit_code == 0, merged.stderr
    again = cli("predict", tmp_path / "merged", *question)
    first, second = (json.loads(found.stdout) for found in (answer, again))
    assert first["label"] == second["label"]
    assert first["scores"] == pytest.approx(second["scores"], abs=1e-3)


def test_stages_build_on_one_another(cli, recipe, tmp_path):
    path = recipe(stages=STAGES)
    result = cli("train", path)
    assert result.exit_code == 0, result.stderr
    run = tmp_path / "run"
    assert (run / "stage-1" / "adapter_config.json").is_file()
    assert json.loads((run / "hybrid.json").read_text())["parts"] == ["0-lora", "1-full"]
    first = load_file(run / "stage-1" / "adapter_model.safetensors")
    last = load_file(run / "0-lora" / "adapter_model.safetensors")
    lora = [name for name in first if "lora_" in name]
    assert len(lora) == 8
    assert all((first[name] == last[name]).all() for name in lora)  # frozen in the second stage
    head = next(name for name in first if name.endswith("classifier.weight"))
    assert (first[head] != last[head]).any()  # which went on with the head
    answer = cli("predict", run, "the rain is wind good")
    assert answer.exit_code == 0, answer.stderr
    assert cli("predict", run / "stage-1", "the rain is wind good").stdout != answer.stdout
    resolved = load_recipe(run / "recipe.yaml")
    assert resolved.stages == STAGES
    assert [stage.training_arguments().max_steps for stage in resolved.stage_recipes()] == [3, 2]


def test_a_finished_stage_is_not_trained_again(cli, recipe, tmp_path):
    path = recipe(stages=STAGES)
    assert cli("train", path).exit_code == 0
    run = tmp_path / "run"
    expected = cli("predict", run, "the rain is wind good").stdout
    for entry in run.iterdir():  # as if it had been stopped between the stages
        if entry.name != "stage-1":
            shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
    before = snapshot(run / "stage-1")
    result = cli("train", path, "--resume")
    assert result.exit_code == 0, result.stderr
    assert "stage 1 of 2 is done" in result.stderr
    assert snapshot(run / "stage-1") == before
    assert cli("predict", run, "the rain is wind good").stdout == expected


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"stages": STAGES, "peft": LORA}, "peft belongs into each of the stages"),
        ({"stages": [{"train": {}}]}, "stages, number 1: a stage has the keys peft and"),
        ({"stages": [{"peft": LORA, "tune": {}}]}, "stages, number 1: a stage has the keys"),
        ({"stages": ["lora"]}, "stages must be a list of"),
        ({"stages": [{"peft": {"method": "lore"}}]}, "number 1: .*did you mean 'lora'"),
        (
            {"stages": [{"peft": LORA}, {"peft": LORA, "train": {"lr": 1}}]},
            "number 2: unknown key 'train.lr'",
        ),
        ({"peft": []}, "peft must be a mapping with the key method"),
        ({"peft": [LORA, "lora"]}, "peft must be"),
        ({"peft": [LORA, {"r": 4}]}, "peft.method is missing"),
    ],
)
def test_bad_stages_and_hybrids(cli, recipe, tmp_path, sections, message):
    result = cli("train", recipe(**sections))
    assert result.exit_code == 2
    assert re.search(message, result.stderr), result.stderr
    assert not (tmp_path / "run").exists()
