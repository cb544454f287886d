"""LoRA, (IA)3 and other methods of AdapterHub's library: converted, they answer as they did there."""

from __future__ import annotations

import json
import logging
import shutil

import mindspore as ms
import numpy as np
import peft
import pytest
import torch
import transformers
from safetensors.numpy import save_file

from mindpeft import PeftModel
from mindpeft.convert.checkpoint import open_checkpoint
from mindpeft.errors import InputError
from mindpeft.foreign.convert import convert_adapter
from tests.tuners.adapterhub import DATA, EXPECTED, logits, make_base


@pytest.fixture(autouse=True)
def pynative_mode():
    ms.set_context(mode=ms.PYNATIVE_MODE)
    yield
    ms.set_context(mode=ms.GRAPH_MODE)


def torch_logits(folder):
    """What Hugging Face PEFT makes of an adapter."""
    base = transformers.AutoModelForSequenceClassification.from_pretrained(DATA / "base")
    inputs = {
        key: torch.from_numpy(EXPECTED[key]) for key in ("input_ids", "attention_mask", "token_type_ids")
    }
    with torch.no_grad():
        return peft.PeftModel.from_pretrained(base, folder).eval()(**inputs).logits.numpy()


@pytest.mark.parametrize(
    ("name", "method", "tensors"),
    [("lora", "LORA", 4 + 2), ("lora_all", "LORA", 20), ("ia3", "IA3", 6), ("ia3_scaled", "IA3", 8)],
)
def test_lora_and_ia3_open_here_and_in_peft(tmp_path, name, method, tensors):
    done = convert_adapter(DATA / name, tmp_path / "peft")
    assert (done.source_format, done.method, done.tensors) == ("adapterhub", method, tensors)
    model = PeftModel.from_pretrained(make_base(), tmp_path / "peft")
    expected = EXPECTED[f"{name}/logits"]
    assert not np.allclose(logits(make_base()), expected, atol=1e-2)
    np.testing.assert_allclose(logits(model), expected, atol=1e-5)
    np.testing.assert_allclose(torch_logits(tmp_path / "peft"), expected, atol=1e-5)


def test_what_peft_does_not_have_is_said(tmp_path, caplog):
    with caplog.at_level(logging.WARNING):
        assert (
            convert_adapter(DATA / "unipelt", tmp_path / "a").method == "HUB_PREFIX + BOTTLENECK + GATED_LORA"
        )
    assert "moves the real tokens' positions" in caplog.text
    assert "GATED_LORA, which Hugging Face PEFT does not have" in caplog.text


def edited(tmp_path, name, keys=None, rename=None, change=None):
    """A copy of a stored folder with changes."""
    folder = tmp_path / "edited"
    shutil.copytree(DATA / name, folder)
    path = folder / "adapter_config.json"
    content = json.loads(path.read_text())
    content["config"] |= keys or {}
    path.write_text(json.dumps(content))
    with open_checkpoint(folder / "pytorch_adapter.bin") as checkpoint:
        tensors = {key: checkpoint[key].numpy() for key in checkpoint}
    (folder / "pytorch_adapter.bin").unlink()
    tensors = {(rename or str)(key): value for key, value in tensors.items()}
    tensors = {key: np.array((change or np.asarray)(value)) for key, value in tensors.items()}
    save_file(tensors, folder / "adapter.safetensors")
    return folder


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("lora", {"keys": {"architecture": "reft"}}, "the architecture 'reft' have no equal"),
        ("lora", {"keys": {"architecture": ["lora"]}}, "have no equal"),
        ("lora", {"keys": {"vera_d": 0.1}}, "VeRA of AdapterHub has no equal"),
        ("lora", {"keys": {"composition_mode": "mul"}}, "composition_mode must be one of add, scale"),
        ("lora", {"keys": {"alpha": None}}, "alpha must be a number"),
        ("lora", {"keys": {"r": 3}}, "matrix's of rank 3"),
        ("lora", {"keys": {"use_gating": True}}, "but not those wanted"),
        ("lora", {"rename": lambda key: key.replace("0.attention.self.query.loras.lora", "0.loras.b")},
         "several adapters: b, lora"),
        ("lora", {"rename": lambda key: key.replace("loras", "reft")}, "tensors of another method"),
        ("lora", {"change": np.ravel}, "matrix's of rank 4"),
        ("ia3", {"keys": {"use_gating": True}}, "not those wanted"),
        ("lora", {"keys": {"composition_mode": "scale"}}, "not those wanted"),
        ("prefix", {"keys": {"leave_out": [1]}}, "leave_out has no equal"),
        ("prefix", {"keys": {"prefix_length": 0}}, "prefix_length must be a positive integer"),
        ("prefix", {"keys": {"non_linearity": "sine"}}, "non_linearity must be one of"),
        ("prefix", {"rename": lambda key: key.replace("wte", "word")}, "not those wanted"),
        ("prefix", {"rename": lambda key: key.replace("self_prefix", "cross_prefix")}, "of self-attention"),
        ("prefix", {"change": lambda value: value[:2].copy()}, "don't fit together"),
        ("prefix_flat", {"keys": {"prefix_length": 5}}, "not those of 5 tokens"),
        ("mam", {"keys": {"configs": {}}}, "a union must have configs"),
        ("mam", {"keys": {"configs": [{"architecture": "lora"}] * 2}}, "can't be told apart"),
        ("mam", {"keys": {"configs": [{"architecture": ["lora"]}]}}, "of a union must be text"),
        ("prefix", {"change": lambda value: value.reshape(-1)[0]}, "a single number"),
        ("prefix", {"change": np.ravel}, "don't fit together"),
        ("mam", {"keys": {"configs": [{"architecture": "lora"}]}}, "tensors of none of the union's methods"),
    ],
)  # fmt: skip
def test_what_has_no_equal_is_refused(tmp_path, name, changes, message):
    with pytest.raises(InputError, match=message):
        convert_adapter(edited(tmp_path, name, **changes), tmp_path / "out")
    assert not (tmp_path / "out").exists()
