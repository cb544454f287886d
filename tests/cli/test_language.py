"""Decoders on the command line: a model from nothing, training in stages, evaluation, writing, talking."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
import yaml

from mindpeft.cli.chat import Talk, talk
from mindpeft.cli.speaking import open_speaker

FACTS = [("the sun", "weather"), ("a goal", "sport"), ("the rain", "weather"), ("a match", "sport")] * 12


@pytest.fixture(scope="module")
def good(cli):
    """Calls the command line, which must succeed."""

    def call(*arguments):
        result = cli(*arguments)
        assert result.exit_code == 0, result.stderr
        return result

    return call


@pytest.fixture(scope="module")
def tiny(tmp_path_factory, good):
    folder = tmp_path_factory.mktemp("language") / "tiny"
    sizes = ["hidden_size=48", "intermediate_size=96", "num_hidden_layers=2", "num_attention_heads=4"]
    lines = folder.parent / "words.txt"
    lines.write_text("\n".join(f"{question} is {answer}" for question, answer in FACTS))
    good("init-model", folder, *sizes, "--vocab-size", "300", "--data", lines)
    return folder


@pytest.fixture(scope="module")
def recipe(tiny) -> Path:
    rows = [{"prompt": question, "completion": answer} for question, answer in FACTS]
    (tiny.parent / "facts.json").write_text(json.dumps(rows))
    (tiny.parent / "plain.txt").write_text("\n".join(f"{a} is {b}" for a, b in FACTS))
    lora = {"method": "lora", "r": 8, "target_modules": "all-linear"}
    values = {
        "model": {"path": str(tiny)},
        "data": {"train": str(tiny.parent / "facts.json"), "test": str(tiny.parent / "facts.json")},
        "train": {"per_device_train_batch_size": 8, "learning_rate": 1e-2, "max_steps": 80},
        "stages": [
            {"peft": {"method": "full"}, "data": _plain(tiny.parent / "plain.txt")},
            {"peft": {**lora, "modules_to_save": ["lm_head"]}},  # whose tokens of turns are random
        ],
        "output_dir": str(tiny.parent / "run"),
        "device": "CPU",
    }
    values["data"] |= {"task": "instruction", "max_length": 48, "packing": True}
    path = tiny.parent / "recipe.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


def _plain(path: Path) -> dict:
    return {"task": "causal_lm", "train": str(path), "test": str(path), "packing": False, "max_length": 32}


@pytest.fixture(scope="module")
def run(recipe, good) -> Path:
    good("train", recipe)
    return recipe.parent / "run"


def test_stages_of_text_and_of_instructions(run, good):
    first = json.loads((run / "stage-1" / "metrics.json").read_text())["test"]
    metrics = json.loads((run / "metrics.json").read_text())["test"]
    assert metrics["test_perplexity"] < 3 < first["test_perplexity"] + 3
    result = good("eval", run, "--json")
    found = json.loads(result.stdout)
    assert found["perplexity"] == pytest.approx(metrics["test_perplexity"], rel=1e-4)


def test_generate(run, good, tmp_path):
    one = good("generate", run, "the sun", "--max-new-tokens", "8").stdout
    assert one.strip() == "weather"
    questions = tmp_path / "questions.txt"
    questions.write_text("the sun\n\na goal\n")
    result = good("generate", run, "--file", questions, "--max-new-tokens", "8")
    answers = [json.loads(line) for line in result.stdout.splitlines()]
    assert answers == [{"prompt": "the sun", "text": "weather"}, {"prompt": "a goal", "text": "sport"}]
    raw = good("generate", run, "--raw", "the sun", "--max-new-tokens", "4", "--num-beams", "2")
    assert "prompt" in raw.stdout


def test_chat(run, recipe, monkeypatch, capsys):
    speaker = open_speaker(run, adapters=[f"again={run}"], max_new_tokens=8)
    lines = ["the sun", "/adapters", "/adapter again", "a goal", "/adapter bse", "/adapter base", "hello"]
    lines += ["/reset", "/system Be brief.", "/help", "/nothing", "/exit", "never said"]
    monkeypatch.setattr("sys.stdin", io.StringIO("\n".join(lines)))
    conversation = Talk(speaker)
    talk(conversation)
    shown = capsys.readouterr().out
    assert shown.startswith("weather\ndefault, again, base\nagain answers\n")
    assert "no adapter 'bse'; did you mean 'base'?" in shown
    assert "base answers" in shown
    assert "no command '/nothing'; /help lists them" in shown
    assert "/adapter NAME" in shown
    assert conversation.messages == [{"role": "system", "content": "Be brief."}]


def test_export(run, good, tmp_path):
    good("export", run, "-o", tmp_path / "exported", "--prompt", "40", "--new-tokens", "8")
    assert {path.name for path in (tmp_path / "exported").iterdir()} >= {
        "prefill.mindir",
        "decode.mindir",
        "settings.json",
        "generate.py",
        "tokenizer.json",
    }


REFUSED = {
    "export of no decoder": (["export", "BERT", "-o", "NEW"], "is no decoder"),
    "no decoder": (["generate", "BERT", "x"], "can't write text: it is no decoder"),
    "template": (["generate", "RUN", "x", "--template", "chatlm"], "unknown template 'chatlm'"),
    "temperature": (["generate", "RUN", "x", "--temperature", "0"], "temperature must be a number greater"),
    "both": (["generate", "RUN", "x", "--file", "y"], "give prompts or --file, not both"),
    "file": (["generate", "RUN", "--file", "nowhere.txt"], "no such file: nowhere.txt"),
    "predict": (["predict", "RUN", "x"], "is instruction; mindpeft generate writes text"),
    "adapter": (["chat", "RUN", "--adapter", "x"], "--adapter x: write NAME=FOLDER"),
    "there": (["init-model", "RUN"], "is there already and not empty"),
    "size": (
        ["init-model", "NEW", "hidden_sizes=3"],
        "has no key 'hidden_sizes'; did you mean 'hidden_size'",
    ),
    "no size": (["init-model", "NEW", "3"], "'3' is no size: write key=value"),
    "type": (["init-model", "NEW", "--model-type", "bert"], "--model-type bert is no decoder"),
}


@pytest.mark.parametrize(("arguments", "message"), REFUSED.values(), ids=REFUSED)
def test_refused(run, tiny_bert, tmp_path, cli, arguments, message):
    places = {"RUN": run, "BERT": tiny_bert, "NEW": tmp_path / "new"}
    result = cli(*[places.get(argument, argument) for argument in arguments])
    assert result.exit_code != 0
    assert message in " ".join(result.stderr.split())
    assert not (tmp_path / "new").exists()
