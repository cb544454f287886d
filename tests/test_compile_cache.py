"""Graphs on the disk: found again by a process that compiles the same, by no other."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import mindspore as ms
import numpy as np
import pytest
from mindspore import Tensor, nn

from mindpeft import LoraConfig, get_peft_model, structure
from mindpeft.compile_cache import SWITCH, CompileCache, graph_key
from mindpeft.models import AutoModelForCausalLM
from mindpeft.train.optim import AdamW
from mindpeft.train.step import TrainStep
from tests.models.decoders import labels_of, make_decoder, make_texts

pytestmark = pytest.mark.usefixtures("graph_mode")
ROOT = Path(__file__).resolve().parents[1]


def make_step(folder: Path, batch: dict | None = None, **options) -> tuple[TrainStep, list]:
    """A training step of a small decoder, and its arguments."""
    seed, lora = options.pop("seed", 0), options.pop("lora", {})
    model = AutoModelForCausalLM.from_pretrained(folder, **options.pop("model", {}))
    ms.set_seed(seed)
    config = {"target_modules": "all-linear", "r": 4, "init_lora_weights": False, **lora}
    model = get_peft_model(model, LoraConfig(**config)).set_train()
    optimizer = AdamW(model, **options.pop("optimizer", {}))
    texts = make_texts() if batch is None else batch
    columns = {**texts, "labels": labels_of(texts)}
    step = TrainStep(model, tuple(columns), optimizer, **{"max_grad_norm": 1.0, **options})
    scalars = Tensor(True), Tensor(1.0, ms.float32), *optimizer.scalars(1, 1e-2)
    return step, [*scalars, *map(Tensor, columns.values())]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    made = tmp_path_factory.mktemp("base")
    make_decoder("llama", made)
    return made


CHANGES = {
    "rank": {"lora": {"r": 8}},
    "targets": {"lora": {"target_modules": ["q_proj"]}},
    "dropout": {"lora": {"lora_dropout": 0.1}},
    "weights' dtype": {"model": {"dtype": "bfloat16"}},
    "a scale in the model": {"model": {"rms_norm_eps": 1e-3}},
    "clipping": {"max_grad_norm": 2.0},
    "the optimizer": {"optimizer": {"betas": (0.9, 0.99)}},
    "decay": {"optimizer": {"weight_decay": 0.1}},
    "accumulation": {"accumulation_steps": 2},
    "length": {"batch": make_texts(length=19)},
    "rows": {"batch": make_texts(rows=2)},
}


@pytest.mark.parametrize("change", CHANGES)
def test_another_graph_has_another_key(change, folder):
    key = graph_key(*make_step(folder))
    assert key is not None
    assert graph_key(*make_step(folder)) == key
    assert graph_key(*make_step(folder, seed=5)) == key, "values of parameters are not in the graph"
    assert graph_key(*make_step(folder, **CHANGES[change])) not in (key, None)


def test_an_edited_class_of_a_user_has_another_key(tmp_path, monkeypatch):
    """Its module is none of mindpeft's, whose sources are all read anyway."""
    monkeypatch.syspath_prepend(tmp_path)
    keys = []
    for factor in (2, 3, 2):
        lines = (
            "from mindspore import nn",
            "class Own(nn.Cell):",
            " def construct(self, x):",
            f"  return x * {factor}",
        )
        (tmp_path / "own_cells.py").write_text("\n".join(lines))
        structure._foreign_source.cache_clear()  # a process reads a file once
        keys.append(graph_key(importlib.import_module("own_cells").Own(), []))
        del sys.modules["own_cells"]
    assert keys[0] == keys[2] != keys[1]


def test_a_value_of_an_unknown_kind_is_not_kept(folder):
    step, arguments = make_step(folder)
    step.model.base_model.oddity = object()
    assert graph_key(step, arguments) is None


def test_the_environment_is_as_before(tmp_path, monkeypatch):
    monkeypatch.setenv(SWITCH, str(tmp_path))
    monkeypatch.setenv("MS_COMPILER_CACHE_PATH", "before")
    monkeypatch.delenv("MS_COMPILER_CACHE_ENABLE", raising=False)
    with CompileCache() as cache:
        cache.open(nn.ReLU(), [])
        assert os.environ["MS_COMPILER_CACHE_ENABLE"] == "1"
        assert Path(os.environ["MS_COMPILER_CACHE_PATH"]).parent == tmp_path
    assert os.environ["MS_COMPILER_CACHE_PATH"] == "before"
    assert "MS_COMPILER_CACHE_ENABLE" not in os.environ


def test_without_the_switch_nothing_is_written(monkeypatch):
    monkeypatch.delenv(SWITCH, raising=False)
    with CompileCache() as cache:
        cache.open(nn.ReLU(), [])
        assert "MS_COMPILER_CACHE_ENABLE" not in os.environ


def losses_in_a_process(folder: Path, cache: Path | None, seed: int, alpha: int) -> list[float]:
    """Three losses of a fresh process."""
    environment = {**os.environ, SWITCH: str(cache or ""), "PYTHONHASHSEED": str(seed + 1)}
    command = [sys.executable, "-m", "tests.test_compile_cache", str(folder), str(seed), str(alpha)]
    done = subprocess.run(command, cwd=ROOT, env=environment, check=True, capture_output=True, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def main(folder: str, seed: str, alpha: str) -> None:
    ms.set_context(mode=ms.GRAPH_MODE)
    step, arguments = make_step(Path(folder), seed=int(seed), lora={"lora_alpha": int(alpha)})
    print(json.dumps([float(step(*arguments)[0].asnumpy()) for _ in range(3)]))


def test_another_process_finds_it_and_reads_its_own_weights(folder, tmp_path):
    first = losses_in_a_process(folder, tmp_path, 0, 8)
    written = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.is_file()}
    assert any(path.suffix == ".mindir" for path in written)
    assert losses_in_a_process(folder, tmp_path, 0, 8) == first
    other = losses_in_a_process(folder, tmp_path, 7, 24)
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.is_file()} == written
    expected = losses_in_a_process(folder, None, 7, 24)
    np.testing.assert_array_equal(other, expected)
    assert other != first


if __name__ == "__main__":
    main(*sys.argv[1:])
