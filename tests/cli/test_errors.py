"""Each bad input ends in one clear line and exit code 2, and leaves the disk as it was."""

from __future__ import annotations

import errno
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from mindpeft.cli.main import main
from tests.cli.conftest import snapshot
from tests.cli.worlds import World


@pytest.fixture
def world(tmp_path: Path, tiny_bert: Path, data_dir: Path, finished_run: Path) -> World:
    return World(tmp_path, tiny_bert, data_dir, finished_run)


Builder = Callable[[World], list]


def after(damage: Callable[[World], object], arguments: Builder) -> Builder:
    """Damage the world first."""

    def build(world: World) -> list:
        damage(world)
        return arguments(world)

    return build


def train(*overrides: str, **sections: str) -> Builder:
    return lambda world: world.train(*overrides, **sections)


def with_data(*rows: tuple[str, ...], part: str = "train") -> Builder:
    return lambda world: world.train(f"data.{part}={world.csv(*rows)}")


ONE_LABEL = ("x.csv", "text,label\na,b\nc,b\n")
NOT_UTF8 = ("x.csv", b"text,label\na\xff\xff,b")


CASES: dict[str, tuple[Builder, list[str]]] = {
    # recipes
    "no recipe": (lambda w: ["train", w.folder / "none.yaml"], ["no such recipe"]),
    "broken YAML": (
        lambda w: ["train", w.file("x.yaml", "model:\n  path: [a\n")],
        ["not valid YAML", "line 3"],
    ),
    "tab in YAML": (
        lambda w: ["train", w.file("x.yaml", "model:\n\tpath: a\n")],
        ["not valid YAML", "line 2"],
    ),
    "a list for a recipe": (lambda w: ["train", w.file("x.yaml", "- a\n")], ["must hold the sections"]),
    "binary recipe": (lambda w: ["train", w.file("x.yaml", b"\xff\xfe\x00")], ["not valid YAML"]),
    "key twice": (train(train="  learning_rate: 1e-4\n"), ["'learning_rate' occurs twice", "line"]),
    "python object in YAML": (
        lambda w: ["train", w.file("x.yaml", "model: !!python/object/apply:os.system [touch owned]\n")],
        ["not valid YAML"],
    ),
    "unknown recipe key": (
        train(train="  learning_rat: 1e-4\n"),
        ["'train.learning_rat'", "did you mean 'learning_rate'?", "allowed in train"],
    ),
    "unknown section": (train("optimiser.lr=1"), ["'optimiser'", "allowed: model, data, peft, train"]),
    "no data section": (
        lambda w: ["train", w.file("x.yaml", "model: {path: a}\n")],
        ["section data is missing"],
    ),
    "text for a number": (
        train("train.num_train_epochs=many"),
        ["train.num_train_epochs must be a number", "'many'"],
    ),
    "negative rate": (train("train.learning_rate=-1"), ["train", "learning_rate must be greater than 0"]),
    "number for a list": (train("data.columns=3"), ["data.columns must be a list of text or null, not 3"]),
    "yes for text": (train("data.text=yes"), ["data.text must be text", "quotes"]),
    "seed in train": (train("train.seed=1"), ["train.seed", "write seed"]),
    "no equals sign": (train("train.seed"), ["write key=value"]),
    "unknown task": (train("data.task=regresion"), ["data.task", "did you mean 'regression'?"]),
    "unknown method": (train("peft.method=lorra"), ["peft.method", "did you mean 'lora'?"]),
    "unknown method key": (train("peft.lora_alfa=3"), ["'peft.lora_alfa'", "did you mean 'lora_alpha'?"]),
    "bad rank": (train("peft.r=0"), ["peft", "r must"]),
    "no target matched": (train("peft.target_modules=[qwery]"), ["qwery", "query"]),
    "unknown device": (train("device=TPU"), ["device", "Ascend, GPU, CPU", "'TPU'"]),
    "absent device": (train("device=Ascend"), ["device 'Ascend' is absent", "CPU"]),
    "too long": (train("data.max_length=999"), ["data.max_length is 999", "64 positions"]),
    "nothing to resume": (lambda w: [*w.train(), "--resume"], ["nothing to resume"]),
    # output
    "output not empty": (lambda w: w.train(f"output_dir={w.run}"), ["is not empty", "--overwrite"]),
    "output is a file": (lambda w: w.train(f"output_dir={w.file('f', 'x')}"), ["is a file"]),
    "output can't be made": (train("output_dir=/proc/mindpeft/run"), ["can't write /proc/mindpeft/run"]),
    # checkpoints
    "no model folder": (train("model.path=/nowhere/bert"), ["folder: /nowhere/bert"]),
    "no such package": (train("model.path=package:no_such_model/x"), ["pip install --no-deps no-such-model"]),
    "no config.json": (after(lambda w: (w.bert / "config.json").unlink(), train()), ["has no config.json"]),
    "config.json is no JSON": (
        after(lambda w: (w.bert / "config.json").write_text("{,"), train()),
        ["config.json is not valid JSON", "line 1"],
    ),
    "unknown model_type": (
        after(lambda w: w.edit_config(model_type="bertt"), train()),
        ["model_type 'bertt' is not supported", "bert"],
    ),
    "truncated weights": (after(World.truncate_weights, train()), ["model.safetensors", "truncated"]),
    "corrupt header": (after(World.corrupt_header, train()), ["model.safetensors"]),
    "malicious pickle": (after(World.malicious_bin, train()), ["pytorch_model.bin", "system"]),
    "shard missing": (
        after(lambda w: w.index("model-00002-of-00002.safetensors"), train()),
        ["which is missing"],
    ),
    "index leaves the folder": (
        after(lambda w: w.index("../../x"), train()),
        ["'../../x'", "not a file of its folder"],
    ),
    "misshapen tensor": (
        after(lambda w: w.edit_config(intermediate_size=48), train()),
        ["intermediate.dense.weight is (64, 32) in the file and (48, 32) in the model"],
    ),
    "no tokenizer": (after(lambda w: (w.bert / "vocab.txt").unlink(), train()), ["vocab.txt"]),
    "no weights": (after(lambda w: (w.bert / "model.safetensors").unlink(), train()), ["holds no weights"]),
    # data
    "no data file": (train("data.train=/nowhere/x.csv"), ["no such file: /nowhere/x.csv"]),
    "ragged row": (with_data(("one", "two", "three")), ["bad.csv, line 6", "3 fields"]),
    "empty text": (with_data((" ", "food")), ["bad.csv, line 6", "empty text"]),
    "empty label": (with_data(("text", "")), ["bad.csv, line 6", "no label"]),
    "missing column": (train("data.label=lable"), ["no column 'lable'", "did you mean 'label'?"]),
    "unknown label in test": (
        with_data(("text", "fod"), part="test"),
        ["bad.csv, line 6", "unknown label 'fod'", "did you mean 'food'?"],
    ),
    "one label": (
        lambda w: w.train(f"data.train={w.file(*ONE_LABEL)}"),
        ["only label is 'b'"],
    ),
    "not UTF-8": (lambda w: w.train(f"data.train={w.file(*NOT_UTF8)}"), ["line 2"]),
    "regression over words": (train("data.task=regression"), ["train.csv, line 2", "finite number"]),
    # eval
    "eval: label never seen": (
        lambda w: ["eval", w.run, "--data", w.csv(("text", "politics"))],
        ["bad.csv, line 6", "unknown label 'politics'", "food, sport, weather"],
    ),
    "eval: no file": (lambda w: ["eval", w.run, "--data", "/nowhere/x.csv"], ["no such file"]),
    "eval: no run": (lambda w: ["eval", "/nowhere/run", "--data", w.csv()], ["no such folder: /nowhere/run"]),
    "eval: no adapter": (lambda w: ["eval", w.data, "--data", w.csv()], ["no adapter_config.json"]),
    "eval: no column": (
        lambda w: ["eval", w.run, "--data", w.csv(), "--text", "txt"],
        ["no column 'txt'", "text"],
    ),
    # predict
    "predict: empty text": (lambda w: ["predict", w.run, " "], ["a text is empty"]),
    "predict: text and file": (lambda w: ["predict", w.run, "a", "--file", w.csv()], ["not both"]),
    "predict: no file": (lambda w: ["predict", w.run, "--file", "/nowhere/x.txt"], ["no such file"]),
    "predict: pair for single": (lambda w: ["predict", w.run, "a", "--pair", "b"], ["leave out --pair"]),
    "predict: odd file": (lambda w: ["predict", w.run, "--file", w.file("x.doc", "a")], ["x.doc", ".csv"]),
    "predict: base moved": (
        after(
            lambda w: edit_adapter(w, base_model_name_or_path="/nowhere/bert"),
            lambda w: ["predict", w.run, "a"],
        ),
        ["/nowhere/bert", "--base"],
    ),
    "predict: broken labels": (
        after(lambda w: (w.run / "labels.json").write_text("[]"), lambda w: ["predict", w.run, "a"]),
        ["labels.json"],
    ),
    "predict: a language model": (lambda w: ["predict", w.bert, "a"], ["answers with labels", "masked_lm"]),
    "predict: corrupt adapter": (
        after(
            lambda w: (w.run / "adapter_model.safetensors").write_bytes(b"x"),
            lambda w: ["predict", w.run, "a"],
        ),
        ["adapter_model.safetensors"],
    ),
    "predict: unknown method": (
        after(lambda w: edit_adapter(w, peft_type="LORRA"), lambda w: ["predict", w.run, "a"]),
        ["adapter_config.json", "LORRA"],
    ),
    # merge
    "merge: another base": (
        after(lambda w: edit_adapter(w, r=8), lambda w: ["merge", w.run, "-o", w.folder / "m"]),
        ["does not fit", "(4, 32)", "(8, 32)"],
    ),
    "merge: output not empty": (lambda w: ["merge", w.run, "-o", w.data], ["is not empty", "--overwrite"]),
    "merge: onto the run": (lambda w: ["merge", w.run, "-o", w.run, "--overwrite"], ["is or holds"]),
    "merge: no adapter": (lambda w: ["merge", w.bert, "-o", w.folder / "m"], ["whole checkpoint"]),
    "merge: no base": (lambda w: ["merge", w.run, "--base", "/nowhere", "-o", w.folder / "m"], ["/nowhere"]),
    "merge: bad size": (
        lambda w: ["merge", w.run, "-o", w.folder / "m", "--max-shard-size", "big"],
        ["'big' is no size"],
    ),
    # convert
    "convert: no source": (
        lambda w: ["convert", "/nowhere", w.folder / "c"],
        ["no such file or folder: /nowhere"],
    ),
    "convert: not empty": (lambda w: ["convert", w.bert, w.data], ["is not empty"]),
    "convert: onto itself": (
        lambda w: ["convert", w.bert, w.bert, "--overwrite"],
        ["is or holds the source"],
    ),
    "convert: bad dtype": (lambda w: ["convert", w.bert, w.folder / "c", "--dtype", "int3"], ["int3"]),
    "convert: malicious pickle": (
        lambda w: ["convert", w.malicious_bin(), w.folder / "c"],
        ["pytorch_model.bin", "system"],
    ),
    "convert: truncated": (
        after(World.truncate_weights, lambda w: ["convert", w.bert, w.folder / "c"]),
        ["model.safetensors"],
    ),
    "convert: can't write": (lambda w: ["convert", w.bert, "/proc/mindpeft/c"], ["can't write"]),
    # info
    "info: nothing there": (lambda w: ["info", "/nowhere"], ["no such file or folder"]),
    "info: no checkpoint": (lambda w: ["info", w.data], ["holds no weights"]),
    "info: nothing asked": (lambda w: ["info"], ["give a path, or --env"]),
    "info: text file": (lambda w: ["info", w.file("x.bin", "hello")], ["x.bin"]),
}


def edit_adapter(world: World, **changes: object) -> None:
    path = world.run / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def expect_one_line(result, fragments: list[str]) -> None:
    lines = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert result.exit_code == 2, result.output
    assert len(lines) == 1, result.stderr
    assert result.stderr.rstrip().endswith(lines[0])
    assert "Traceback" not in result.output
    for fragment in fragments:
        assert fragment in lines[0]


@pytest.mark.parametrize("case", CASES)
def test_one_clear_line_and_nothing_changed(case: str, world: World, cli, monkeypatch):
    build, fragments = CASES[case]
    monkeypatch.chdir(world.folder)
    arguments = build(world)
    before = snapshot(world.folder)
    result = cli(*arguments, stdin="")
    expect_one_line(result, fragments)
    assert snapshot(world.folder) == before


def _refusing(code: int) -> Callable:
    def refuse(*_: object, **__: object) -> None:
        raise OSError(
            code, {errno.ENOSPC: "No space left on device", errno.EACCES: "Permission denied"}[code]
        )

    return refuse


@pytest.mark.parametrize(
    ("function", "code", "words"),
    [
        ("os.fsync", errno.ENOSPC, "No space left on device"),
        ("tempfile.mkstemp", errno.EACCES, "Permission denied"),
    ],
)
@pytest.mark.parametrize("command", ["train", "convert", "merge"])
def test_disk_full_and_no_permission(command, function, code, words, world: World, cli, monkeypatch):
    arguments = {
        "train": world.train(),
        "convert": ["convert", world.bert, world.folder / "c"],
        "merge": ["merge", world.run, "-o", world.folder / "m"],
    }[command]
    before = snapshot(world.folder)
    monkeypatch.setattr(function, _refusing(code))
    expect_one_line(cli(*arguments), ["can't write", words])
    monkeypatch.undo()
    assert snapshot(world.folder) == before


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["trian"], "No such command 'trian'"),
        (["info", "--jsn"], "No such option"),
        (["train"], "Missing argument"),
    ],
)
def test_usage_errors_exit_with_2(arguments, words, cli):
    result = cli(*arguments)
    assert result.exit_code == 2
    assert words in result.stderr
    assert result.stdout == ""


def test_a_bug_is_called_one_and_debug_shows_the_trace(cli, tiny_bert, monkeypatch):
    def fail(*_: object) -> None:
        raise ZeroDivisionError("by design")

    monkeypatch.setattr("mindpeft.cli.info._describe", fail)
    result = cli("info", tiny_bert)
    assert result.exit_code == 1
    assert result.stderr.startswith("bug in mindpeft: ZeroDivisionError: by design")
    assert "--debug" in result.stderr
    assert isinstance(cli("--debug", "info", tiny_bert).exception, ZeroDivisionError)


def test_main_exits_like_the_command_line(capsys):
    with pytest.raises(SystemExit) as exit_:
        main(["info", "/nowhere"])
    assert exit_.value.code == 2
    assert capsys.readouterr().err == "error: no such file or folder: /nowhere\n"


def test_as_a_process(tmp_path: Path):
    command = [sys.executable, "-m", "mindpeft", "train", str(tmp_path / "none.yaml")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=300)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr == f"error: no such recipe: {tmp_path / 'none.yaml'}\n"
    assert list(tmp_path.iterdir()) == []


def test_help_does_not_import_mindspore(tmp_path: Path):
    code = (
        "import sys\ntry:\n  from mindpeft.cli.main import main; main(['--help'])\nexcept SystemExit: pass\n"
    )
    code += "print('mindspore' in sys.modules, 'matplotlib' in sys.modules, file=sys.stderr)"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, timeout=60
    )
    assert done.stderr == "False False\n"
