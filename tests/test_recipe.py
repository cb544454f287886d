from __future__ import annotations

import os
from importlib.resources import files
from pathlib import Path

import pytest

from mindpeft.errors import InputError
from mindpeft.recipe import load_recipe, recipe_from_dict
from mindpeft.recipe_values import describe, fit

MINIMAL = {"model": {"path": "bert"}, "data": {"train": "x.csv"}}


def write(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


@pytest.fixture
def recipe_file(tmp_path: Path) -> Path:
    text = "model: {path: bert}\ndata: {train: x.csv}\ntrain: {learning_rate: 1e-4, eval_strategy: no}\n"
    return write(tmp_path / "recipe.yaml", text)


def test_defaults_and_paths_from_the_current_directory(recipe_file, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    recipe = load_recipe(recipe_file, ["data.test=~/y.csv"])
    assert recipe.model.path == str(tmp_path / "bert")
    assert recipe.data.train == str(tmp_path / "x.csv")
    assert recipe.data.test == os.path.expanduser("~/y.csv")
    assert recipe.peft_configs()[0].peft_type == "LORA"
    assert recipe.peft_configs()[0].task_type == "SEQ_CLS"


def test_a_rate_without_a_dot_is_a_number_and_a_bare_no_is_a_word(recipe_file):
    args = load_recipe(recipe_file).training_arguments()
    assert args.learning_rate == 1e-4
    assert args.eval_strategy == "no"


def test_overrides_win_and_have_the_types_of_yaml(recipe_file):
    recipe = load_recipe(
        recipe_file,
        ["train.learning_rate=2e-3", "peft.method=lora", "peft.r=4", "peft.target_modules=[query]", "seed=7"],
    )
    args = recipe.training_arguments()
    assert (args.learning_rate, args.seed) == (2e-3, 7)
    config = recipe.peft_configs()[0]
    assert config.r == 4
    assert set(config.target_modules) == {"query"}


def test_what_is_saved_reads_back_equal(recipe_file, tmp_path):
    recipe = load_recipe(recipe_file, ["peft.method=lora", "peft.r=4", "data.max_length=32"])
    recipe.save(tmp_path / "saved.yaml")
    again = load_recipe(tmp_path / "saved.yaml")
    assert again.to_dict() == recipe.to_dict()
    assert again.training_arguments() == recipe.training_arguments()
    assert again.peft_configs()[0] == recipe.peft_configs()[0]


def test_max_length_and_device_reach_the_trainer(recipe_file):
    args = load_recipe(recipe_file, ["data.max_length=32", "device=CPU", "device_id=0"]).training_arguments()
    assert (args.max_length, args.device, args.device_id) == (32, "CPU", 0)


@pytest.mark.parametrize(
    ("task", "task_type"),
    [("regression", "SEQ_CLS"), ("token_classification", "TOKEN_CLS"), ("masked_lm", None)],
)
def test_the_task_decides_the_adapters_task_type(task, task_type):
    recipe = recipe_from_dict({**MINIMAL, "data": {"train": "x.csv", "task": task}})
    assert recipe.peft_configs()[0].task_type == task_type


def test_a_contradicting_task_type_is_refused():
    with pytest.raises(InputError, match=r"peft.task_type must be SEQ_CLS"):
        recipe_from_dict({**MINIMAL, "peft": {"method": "lora", "task_type": "TOKEN_CLS"}})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data": {"train": "x", "builtin": "stdlib_docs"}}, "either train, a file, or builtin"),
        ({"data": {"builtin": "stdlib_docs", "test": "y"}}, "brings its own held-out part"),
        ({"data": {}}, "either train, a file, or builtin"),
        ({"data": {"builtin": "stdlib_doc"}}, "did you mean 'stdlib_docs'"),
        ({"data": {"train": "x", "eval_share": 1.0}}, "data.eval_share must be between 0 and 1"),
        ({"data": {"train": "x", "eval_share": 0}}, "data.eval_share must be between 0 and 1"),
        ({"data": {"train": "x", "max_length": 0}}, "data.max_length must be at least 1"),
        ({"model": {"path": "x", "dtype": "fp16"}}, "did you mean 'bfloat16'|model.dtype must be one of"),
        ({"model": {}}, "model.path is missing"),
        ({"peft": {"r": 8}}, "peft.method is missing; methods: .*lora"),
        ({"peft": {"method": "lora", "peft_type": "IA3"}}, "two methods"),
        ({"peft": {"method": "lora", "inference_mode": True}}, "unknown key 'peft.inference_mode'"),
        ({"train": {"load_best_model_at_end": True}}, "load_best_model_at_end needs evaluations"),
        ({"train": {"device": "CPU"}}, "train.device is not a key of train: write device"),
        ({"model": "bert"}, "model must be a mapping, not 'bert'"),
    ],
)
def test_bad_recipes(changes, message):
    with pytest.raises(InputError, match=message):
        recipe_from_dict({**MINIMAL, **changes})


def test_the_message_names_the_file(tmp_path):
    path = write(tmp_path / "r.yaml", "model: {path: a}\ndata: {train: x}\ntrian: {}\n")
    with pytest.raises(InputError, match=r"r.yaml: unknown key 'trian'; did you mean 'train'\?"):
        load_recipe(path)


def test_an_override_through_a_value_is_refused(recipe_file):
    with pytest.raises(InputError, match="train is not a section"):
        load_recipe(recipe_file, ["data.train.x=1"])


@pytest.mark.parametrize(
    ("value", "hint", "result"),
    [
        ("1e-3", float, 1e-3),
        (3, float, 3),
        ([1, "a"], list[str | int] | None, [1, "a"]),
        (None, list[str] | None, None),
        (True, bool | str, True),
        ({"a": 1}, dict[str, int], {"a": 1}),
        ([[1, 2]], list[tuple[int, int]], [(1, 2)]),
    ],
)
def test_values_that_fit(value, hint, result):
    assert fit("key", value, hint) == result


@pytest.mark.parametrize(
    ("value", "hint"),
    [("x", float), (True, int), (1.5, int), ([True], list[int]), ([1, 2, 3], tuple[int, int]), (None, str)],
)
def test_values_that_dont(value, hint):
    with pytest.raises(InputError, match=r"a\.b must be "):
        fit("a.b", value, hint)


def test_hints_in_words():
    assert describe(list[str] | None) == "a list of text or null"
    assert describe(bool | str) == "true or false or text"


def test_the_shipped_recipes_are_valid():
    shipped = [Path(str(files("mindpeft.cli") / "quickstart.yaml"))]
    shipped += (Path(__file__).parents[1] / "scripts" / "recipes").glob("*.yaml")
    assert len(shipped) > 1
    for path in shipped:
        load_recipe(path)
