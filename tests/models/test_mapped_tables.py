"""Models whose embedding tables are pages of their checkpoint's file."""

from __future__ import annotations

import copy
import subprocess
import sys
from pathlib import Path

import mindspore as ms
import numpy as np
import pytest
import torch
import transformers
from mindspore import Tensor
from safetensors.numpy import load_file

from mindpeft import FullConfig, LoraConfig, TrainableTokensConfig, get_peft_model
from mindpeft.convert.checkpoint import Checkpoint
from mindpeft.convert.safetensors_file import _MAPS
from mindpeft.train.optim import AdamW
from mindpeft.train.runner import StepRunner
from tests.models.reference import make_batch, make_reference, open_ours, run_ours, to_numpy

pytestmark = [
    pytest.mark.usefixtures("graph_mode"),
    pytest.mark.skipif(not _MAPS, reason="files are not mapped here"),
]
_TABLES = {f"bert.embeddings.{kind}_embeddings.weight" for kind in ("word", "position", "token_type")}


@pytest.fixture
def mapped(monkeypatch) -> set[str]:
    """The names of the tensors that are mapped."""
    names = set()
    original = Checkpoint.mapped

    def note(self, name):
        raw = original(self, name)
        if raw is not None:
            names.add(name)
        return raw

    monkeypatch.setattr(Checkpoint, "mapped", note)
    return names


def tables(model) -> dict[str, np.ndarray]:
    return {name: to_numpy(p).copy() for name, p in model.parameters_and_names() if name in _TABLES}


def assert_tables(model, expected: dict[str, np.ndarray]) -> None:
    found = tables(model)
    assert found.keys() == expected.keys() & _TABLES
    for name, value in found.items():
        np.testing.assert_array_equal(value, expected[name], err_msg=name)


def test_which_are_mapped(tmp_path, mapped):
    make_reference("sequence", tmp_path)
    open_ours("sequence", tmp_path)
    assert mapped == _TABLES


def test_a_tied_table_is_read(tmp_path, mapped):
    make_reference("masked", tmp_path)
    open_ours("masked", tmp_path)
    assert mapped == _TABLES - {"bert.embeddings.word_embeddings.weight"}


@pytest.mark.parametrize("held", ["float32", "bfloat16"])
def test_bfloat16(tmp_path, mapped, held):
    make_reference("sequence", tmp_path).to(getattr(torch, held)).save_pretrained(tmp_path)
    ours = open_ours("sequence", tmp_path, dtype="bfloat16")
    assert mapped == (_TABLES if held == "bfloat16" else set())
    mapped.clear()
    again = open_ours("sequence", tmp_path)
    assert mapped == (_TABLES if held == "float32" else set())
    widened = {name: to_numpy(Tensor(value).astype(ms.bfloat16)) for name, value in tables(again).items()}
    assert_tables(ours, widened)


def test_saved_over_its_own_file(tmp_path):
    make_reference("sequence", tmp_path)
    first, second = open_ours("sequence", tmp_path), open_ours("sequence", tmp_path)
    before, logits = tables(first), to_numpy(run_ours(first, **make_batch()))
    for _, parameter in second.parameters_and_names():
        parameter.set_data(Tensor(np.full(parameter.shape, 0.5, np.float32)))
    second.save_pretrained(tmp_path)
    assert_tables(first, before)
    np.testing.assert_array_equal(to_numpy(run_ours(first, **make_batch())), logits)
    assert all((value == 0.5).all() for value in tables(open_ours("sequence", tmp_path)).values())


def train(model) -> None:
    batch = {**make_batch(), "labels": np.array([0, 1, 0], np.int32)}
    runner = StepRunner(model.set_train(), AdamW(model), 1, 1.0)
    for step in (1, 2):
        runner.train(batch, step, 1e-2)


@pytest.mark.parametrize(
    "config",
    [
        FullConfig(target_modules=["word_embeddings", "position_embeddings"]),
        TrainableTokensConfig(token_indices=list(range(30)), target_modules=["word_embeddings"]),
        LoraConfig(target_modules=["word_embeddings"], r=2, init_lora_weights=False),
    ],
    ids=["full", "tokens", "lora"],
)
def test_training_and_merging_leave_the_file(tmp_path, config):
    make_reference("sequence", tmp_path)
    file = tmp_path / "model.safetensors"
    content, before = file.read_bytes(), load_file(file)
    model = get_peft_model(open_ours("sequence", tmp_path), config)
    train(model)
    merged = model.merge_and_unload()
    words = "bert.embeddings.word_embeddings.weight"
    assert (tables(merged)[words] != before[words]).any()
    assert file.read_bytes() == content
    merged.save_pretrained(tmp_path / "merged")
    assert_tables(merged, load_file(tmp_path / "merged" / "model.safetensors"))


def test_copies_and_other_dtypes(tmp_path):
    make_reference("sequence", tmp_path)
    ours = open_ours("sequence", tmp_path)
    before = tables(ours)
    other = copy.deepcopy(ours)
    for name, parameter in other.parameters_and_names():
        if name in _TABLES:
            parameter.copy_(Tensor(np.zeros(parameter.shape, np.float32)))
    assert not any(value.any() for value in tables(other).values())
    ours.init_parameters_data()
    ours.gradient_checkpointing_enable()
    assert_tables(ours, before)
    for _, parameter in ours.parameters_and_names():
        parameter.set_dtype(ms.float16)
    assert_tables(ours, {name: value.astype(np.float16) for name, value in before.items()})


MEMORY_SCRIPT = """
import sys
import mindspore as ms
import numpy as np
from mindpeft.models import AutoModel

def anonymous():
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith("RssAnon"))

before = anonymous()
model = AutoModel.from_pretrained(sys.argv[1])
loaded = anonymous()
hidden, _ = model(ms.Tensor(np.arange(0, 100000, 1000, dtype=np.int32)[None]))
assert np.isfinite(hidden.asnumpy()).all()
print(loaded - before, anonymous() - before)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is read from /proc")
def test_only_rows_in_use_take_memory(tmp_path):
    sizes = {"hidden_size": 256, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 64}
    config = transformers.BertConfig(vocab_size=100_000, max_position_embeddings=128, **sizes)
    transformers.BertModel(config).save_pretrained(tmp_path)
    run = subprocess.run(
        [sys.executable, "-c", MEMORY_SCRIPT, str(tmp_path)], capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr
    loaded, used = map(int, run.stdout.split())
    third = 100_000 * 256 * 4 / 3  # of the table
    assert loaded < third
    assert used < third


@pytest.mark.skipif(not Path("/proc/self/smaps").exists(), reason="memory is read from /proc")
def test_no_large_pages_are_asked_for(tmp_path):
    """With them the system reads and maps 2 MB of the file for a row."""
    make_reference("features", tmp_path, vocab_size=60_000)
    ours = open_ours("features", tmp_path)
    run_ours(ours, **make_batch())
    flags, mapping = [], ""
    for line in Path("/proc/self/smaps").read_text().splitlines():
        kind = line.split()[0]
        if "-" in kind:  # the first line about a mapping begins with its addresses
            mapping = line
        elif kind == "VmFlags:" and str(tmp_path) in mapping:
            flags.append(line.split()[1:])
    assert flags
    assert not any("hg" in flag for flag in flags)
