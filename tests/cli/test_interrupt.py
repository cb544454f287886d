"""Ctrl-C in a process of its own, and going on from where it stopped."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

from mindpeft.convert.tensors import RawTensor
from mindpeft.convert.writer import save_checkpoint
from tests.cli.conftest import write_recipe

STEPS = 400


def wait_for_first_log(run: Path, process: subprocess.Popen) -> None:
    deadline = time.monotonic() + 300
    log = run / "train_log.jsonl"
    while not (log.is_file() and log.stat().st_size):
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < deadline, "training did not begin"
        time.sleep(0.05)


def test_ctrl_c_keeps_a_checkpoint_and_resume_ends_the_run(tiny_bert, data_dir, cli, tmp_path):
    run = tmp_path / "run"
    recipe = write_recipe(tmp_path / "recipe.yaml", tiny_bert, data_dir, run)
    command = [sys.executable, "-m", "mindpeft", "train", str(recipe), "train.logging_steps=1"]
    process = subprocess.Popen(
        [*command, f"train.max_steps={STEPS}"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=tmp_path,
        env={**os.environ, "OMP_NUM_THREADS": "2"},
    )
    wait_for_first_log(run, process)
    process.send_signal(signal.SIGINT)
    _, messages = process.communicate(timeout=300)
    assert process.returncode == 130, messages
    last = messages.strip().splitlines()[-1]
    assert last.startswith("interrupted: stopped after step")
    assert "--resume" in last or "resume_from_checkpoint" in last
    assert "Traceback" not in messages

    (checkpoint,) = sorted(run.glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))[-1:]
    stopped_at = json.loads((checkpoint / "trainer_state.json").read_text())["global_step"]
    assert 1 <= stopped_at < STEPS
    assert f"step {stopped_at} of {STEPS}" in last
    assert not (run / "adapter_model.safetensors").exists()
    unfinished = cli("predict", run, "the rain is wind good")
    assert unfinished.exit_code == 2
    assert str(checkpoint) in unfinished.stderr
    assert cli("predict", checkpoint, "the rain is wind good").exit_code == 0

    total = stopped_at + 3
    resumed = cli("train", run / "recipe.yaml", f"train.max_steps={total}", "--resume")
    assert resumed.exit_code == 0, resumed.stderr
    assert f"at step {stopped_at} of {total}" in resumed.stderr
    logged = [json.loads(line) for line in (run / "train_log.jsonl").read_text().splitlines()]
    steps = [line["step"] for line in logged if "loss" in line]
    assert steps == sorted(set(steps))
    assert steps[-1] == total
    assert cli("predict", run, "the rain is wind good").exit_code == 0


def test_ctrl_c_while_converting_leaves_nothing(tmp_path):
    """A checkpoint of shards; the signal comes once a first shard is being written."""
    source, target = tmp_path / "source", tmp_path / "target"
    rows = {f"layer.{i}.weight": np.ones((4096, 4096), np.float32) for i in range(12)}
    save_checkpoint(
        source,
        [(name, RawTensor.from_numpy(value)) for name, value in rows.items()],
        max_shard_size="300MB",
    )
    process = subprocess.Popen(
        [sys.executable, "-m", "mindpeft", "convert", str(source), str(target)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    deadline = time.monotonic() + 120
    while not any(path.stat().st_size for path in tmp_path.glob(".target.*.tmp/*")):
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < deadline, "the conversion did not begin"
        time.sleep(0.002)
    process.send_signal(signal.SIGINT)
    _, messages = process.communicate(timeout=120)
    assert process.returncode == 130, messages
    assert "Traceback" not in messages
    assert [path.name for path in tmp_path.iterdir()] == ["source"]
