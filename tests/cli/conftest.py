"""A tiny BERT on disk, tiny data, one finished run of each kind, and ways to call the command line."""

from __future__ import annotations

import csv
import hashlib
import os
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import CliRunner

TOPICS = {
    "weather": ["sun", "rain", "snow", "wind", "cloud"],
    "sport": ["goal", "ball", "team", "match", "score"],
    "food": ["bread", "soup", "rice", "cake", "salt"],
}
WORDS = [*TOPICS["weather"], *TOPICS["sport"], *TOPICS["food"], "the", "is", "good", "bad"]
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]

Cli = Callable[..., "object"]


@pytest.fixture(scope="session")
def tiny_bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random BERT of 2 layers of width 32 without a pooler, as a Hugging Face folder with vocab.txt."""
    from mindpeft.models.bert import BertConfig, BertForMaskedLM

    folder = tmp_path_factory.mktemp("models") / "tiny-bert"
    letters = "abcdefghijklmnopqrstuvwxyz"
    vocabulary = [*SPECIAL, *WORDS, *letters, *(f"##{letter}" for letter in letters)]
    config = BertConfig(
        vocab_size=len(vocabulary),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=64,
    )
    BertForMaskedLM.from_config(config).save_pretrained(folder)
    (folder / "vocab.txt").write_text("\n".join(vocabulary) + "\n", encoding="utf-8")
    return folder


def write_csv(path: Path, rows: list[tuple[str, ...]], header: tuple[str, ...] = ("text", "label")) -> Path:
    """Write rows under a header."""
    with open(path, "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([header, *rows])
    return path


def topic_rows(count: int, start: int = 0) -> list[tuple[str, str]]:
    """Sentences of three words, two of them from the label's own words."""
    rows = []
    for number in range(start, start + count):
        label = list(TOPICS)[number % 3]
        own = TOPICS[label]
        rows.append((f"the {own[number % 5]} is {own[(number // 3) % 5]} good", label))
    return rows


@pytest.fixture(scope="session")
def data_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """train.csv of 60 rows and test.csv of 12."""
    folder = tmp_path_factory.mktemp("data")
    write_csv(folder / "train.csv", topic_rows(60))
    write_csv(folder / "test.csv", topic_rows(12, start=7))
    return folder


def write_recipe(path: Path, model: Path, data: Path, output: Path, **sections: str) -> Path:
    """A recipe of a few seconds; ``sections`` are YAML lines to append to a section."""
    lines = {
        "model": f"  path: {model}\n",
        "data": f"  train: {data / 'train.csv'}\n  test: {data / 'test.csv'}\n  max_length: 16\n",
        "peft": "  method: lora\n  r: 4\n  target_modules: [query, value]\n",
        "train": "  num_train_epochs: 2\n  learning_rate: 5e-3\n  per_device_train_batch_size: 20\n"
        "  per_device_eval_batch_size: 12\n  max_buckets: 1\n",
    }
    text = "".join(f"{name}:\n{body}{sections.get(name, '')}" for name, body in lines.items())
    path.write_text(f"{text}output_dir: {output}\ndevice: CPU\n", encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def cli() -> Cli:
    """Call the command line in this process: ``cli("info", path)`` gives exit_code, stdout and stderr."""
    from mindpeft.cli.main import app

    def call(*arguments: object, stdin: str | bytes | None = None) -> object:
        return CliRunner().invoke(app, [str(argument) for argument in arguments], input=stdin)

    return call


@pytest.fixture(scope="session")
def finished_run(tiny_bert: Path, data_dir: Path, cli: Cli, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run that classified topics; tests must not change it."""
    folder = tmp_path_factory.mktemp("runs")
    recipe = write_recipe(folder / "recipe.yaml", tiny_bert, data_dir, folder / "topics")
    result = cli("train", recipe)
    assert result.exit_code == 0, result.stderr
    return folder / "topics"


def snapshot(folder: Path) -> dict[str, str]:
    """Every path under a folder with a digest of its content, to show that nothing changed."""
    found = {}
    for root, names, files in os.walk(folder):
        for name in names:
            found[os.path.relpath(os.path.join(root, name), folder)] = "folder"
        for name in files:
            path = Path(root) / name
            content = os.readlink(path).encode() if path.is_symlink() else path.read_bytes()
            found[os.path.relpath(path, folder)] = hashlib.sha256(content).hexdigest()
    return found
