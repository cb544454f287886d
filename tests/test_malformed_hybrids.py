"""Broken hybrid adapters, which are an index and a folder for each method."""

from __future__ import annotations

import json
import shutil

import mindspore as ms
import numpy as np
import pytest

from mindpeft import BitFitConfig, LoraConfig, PeftModel, get_peft_model
from tests.broken_folders import (
    CONFIG,
    PEFT,
    as_folder,
    assert_refused,
    assert_untouched,
    cut,
    drop,
    keys,
    put,
    raw,
    watched,
)

pytestmark = pytest.mark.usefixtures("pynative")

INDEX = "hybrid.json"
LORA, BITFIT = "0-lora", "1-bitfit"
QUERY = "base_model.model.encoder.layer.0.attention.self.query."
PLAIN = "hybrid.json must be .* names of folders beside it"


def index(content):
    return raw(json.dumps(content).encode(), INDEX)


def parts(*names):
    return index({"parts": list(names)})


def inside(part, change):
    """A change of one part's folder."""
    return lambda folder: change(folder / part)


def nested(folder):
    """A part that is a hybrid itself."""
    (folder / BITFIT / CONFIG).unlink()
    (folder / BITFIT / INDEX).write_text(json.dumps({"parts": ["0-lora"]}))


CASES = {
    "empty": (raw(b"", INDEX), "hybrid.json is not valid JSON"),
    "cut": (raw(b'{"parts": ["0-lora"', INDEX), "hybrid.json is not valid JSON: .* at line 1"),
    "binary": (raw(b"\xff\xfe\x00", INDEX), "can't read .*hybrid.json: 'utf-8'"),
    "deep": (raw(b"[" * 10**6, INDEX), "can't read .*hybrid.json: .*recursion"),
    "folder": (as_folder(INDEX), "adapter_config.json"),
    "list": (index([LORA, BITFIT]), PLAIN),
    "null": (index(None), PLAIN),
    "key": (index({"part": [LORA, BITFIT]}), PLAIN),
    "text": (index({"parts": LORA}), PLAIN),
    "object": (index({"parts": {LORA: BITFIT}}), PLAIN),
    "none": (parts(), PLAIN),
    "number": (parts(LORA, 1), PLAIN),
    "list_name": (parts([LORA]), PLAIN),
    "empty_name": (parts(LORA, ""), PLAIN),
    "itself": (parts("."), PLAIN),
    "up": (parts("../other"), PLAIN),
    "parent": (parts(".."), PLAIN),
    "root": (parts("/etc"), PLAIN),
    "inside": (parts("0-lora/deeper"), PLAIN),
    "windows": (parts("..\\other"), PLAIN),
    "drive": (parts("C:other"), PLAIN),
    "nul": (parts("0-lora\0"), PLAIN),
    "long": (parts("x" * 5000), PLAIN),
    "long_bytes": (parts("é" * 200), PLAIN),
    "twice": (parts(LORA, LORA), "hybrid.json names a folder twice"),
    "absent": (parts(LORA, "2-ia3"), "no such adapter folder: .*2-ia3$"),
    "file": (parts(LORA, INDEX), "no such adapter folder: .*hybrid.json$"),
    "nested": (nested, "1-bitfit.*adapter_config.json"),
    "part_config": (inside(LORA, lambda f: (f / CONFIG).unlink()), "0-lora.*adapter_config.json"),
    "part_method": (inside(LORA, keys(peft_type="LORRA")), "0-lora.*unknown peft_type 'LORRA'"),
    "part_value": (inside(LORA, keys(r=-1)), "0-lora.*r must be a positive integer"),
    "part_other": (inside(LORA, keys(peft_type="BITFIT")), "no place for: .*lora_A"),
    "part_weights": (inside(BITFIT, lambda f: (f / PEFT).unlink()), "1-bitfit holds no adapter"),
    "part_cut": (inside(BITFIT, cut), "1-bitfit.* is truncated"),
    "part_missing": (inside(LORA, drop(f"{QUERY}lora_B.weight")), "missing from the file: .*lora_B"),
    "part_shape": (
        inside(BITFIT, put(f"{QUERY}bias", np.ones(3, np.float32))),
        r"query.bias' is \(3,\) in the file and \(16,\) in the model",
    ),
    "part_prompt": (inside(BITFIT, keys(peft_type="PROMPT_TUNING")), "num_virtual_tokens must be"),
}


@pytest.fixture(scope="module")
def sound(twins, tmp_path_factory):
    """A sound hybrid."""
    ms.set_context(mode=ms.PYNATIVE_MODE)
    configs = [LoraConfig(r=2, target_modules=["query"]), BitFitConfig(target_modules=["query"])]
    folder = tmp_path_factory.mktemp("sound")
    get_peft_model(twins.make_model(), configs).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def base(twins):
    """One base model for all cases, since none may change it, with what it holds."""
    ms.set_context(mode=ms.PYNATIVE_MODE)
    return watched(twins.make_model())


@pytest.mark.parametrize("name", CASES)
def test_broken_hybrids(sound, base, tmp_path, name):
    change, message = CASES[name]
    shutil.copytree(sound, tmp_path / "in")
    change(tmp_path / "in")
    model, values, flags = base
    assert_refused(message, lambda: PeftModel.from_pretrained(model, tmp_path / "in"))
    assert_untouched(model, values, flags)


def test_the_sound_hybrid_opens(twins, sound):
    model = PeftModel.from_pretrained(twins.make_model(), sound)
    assert [config.peft_type for config in model.peft_config["default"]] == ["LORA", "BITFIT"]
