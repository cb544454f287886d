"""MindIR graphs and their script: without mindpeft they write what the model writes."""

from __future__ import annotations

import json
import subprocess
import sys

import peft
import pytest
import torch

from mindpeft import PeftModel
from mindpeft.errors import InputError
from mindpeft.generate.export import export_mindir
from mindpeft.models import AutoModel, AutoModelForCausalLM
from mindpeft.ops.cpu import kernels_on
from mindpeft.ops.cpu.library import without_kernels
from tests.models.decoders import make_decoder
from tests.models.reference import make_reference

PROMPTS = [[5, 9, 23, 8], [11, 40]]
# What somebody does who has the folder and no mindpeft.
ALONE = """
import json, sys
sys.path.insert(0, ".")
sys.modules["mindpeft"] = None
from generate import Writer
writer = Writer(".")
texts = [writer.write(json.loads(sys.argv[1]), 12) for _ in range(2)]
print(json.dumps(texts), writer.write(json.loads(sys.argv[1]), 12, 5.0, 1) != texts[0])
"""


def written_alone(folder) -> list[list[int]]:
    command = [sys.executable, "-c", ALONE, json.dumps(PROMPTS)]
    result = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    texts, drawn = result.stdout.rsplit(" ", 1)
    first, second = json.loads(texts)
    assert first == second
    assert drawn.strip() == "True"
    return first


@pytest.mark.usefixtures("graph_mode")
@pytest.mark.parametrize("adapter", ["none", pytest.param("prompt", marks=pytest.mark.slow)])
def test_graphs_write_what_the_model_writes(tmp_path, adapter):
    base = make_decoder("llama", tmp_path / "base")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    if adapter == "prompt":
        torch.manual_seed(0)
        config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=5)
        peft.get_peft_model(base, config).save_pretrained(tmp_path / "adapter")
        model = PeftModel.from_pretrained(model, tmp_path / "adapter")
    expected = model.generate(PROMPTS, max_new_tokens=12, eos_token_id=2).asnumpy()[:, 4:]
    check_export(model, tmp_path, expected)


@pytest.mark.usefixtures("graph_mode")
@pytest.mark.skipif(not kernels_on(), reason="no kernels here")
def test_graphs_of_int8_weights(tmp_path):
    """They hold bytes, and multiply what those stand for."""
    make_decoder("llama", tmp_path / "base")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype="int8")
    with without_kernels(model):  # those would round the rows too
        expected = model.generate(PROMPTS, max_new_tokens=12, eos_token_id=2).asnumpy()[:, 4:]
    check_export(model, tmp_path, expected)


def check_export(model, tmp_path, expected):
    folder = tmp_path / "exported"
    folder.mkdir()
    export_mindir(model, folder, rows=2, prompt=6, new_tokens=20)
    found = written_alone(folder)
    for row, wanted in zip(found, expected.tolist(), strict=True):
        end = wanted.index(2) + 1 if 2 in wanted else 12
        assert row == wanted[:end]


def test_refused(tmp_path):
    make_reference("features", tmp_path / "bert")
    with pytest.raises(InputError, match="is no decoder"):
        export_mindir(AutoModel.from_pretrained(tmp_path / "bert"), tmp_path)
    make_decoder("gpt2", tmp_path / "gpt2")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "gpt2")
    with pytest.raises(InputError, match="max_position_embeddings is 64"):
        export_mindir(model, tmp_path, prompt=60, new_tokens=5)
    with pytest.raises(InputError, match="must be at least 1"):
        export_mindir(model, tmp_path, rows=0)
    assert not list(tmp_path.glob("*.mindir"))
