"""Real configs, indices, a real trained decoder, and somebody else's adapter."""

from __future__ import annotations

import json

import numpy as np
import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file

from mindpeft import PeftModel
from mindpeft.errors import InputError
from mindpeft.models import AutoModelForCausalLM, AutoModelForSequenceClassification
from tests.models.decoders import scaled_error
from tests.models.reference import absolute_error, run_ours, run_theirs, to_numpy


def real_configs(shared_dir) -> dict[str, dict]:
    folders = sorted(path for path in (shared_dir / "configs").iterdir() if (path / "config.json").is_file())
    return {path.name: json.loads((path / "config.json").read_text()) for path in folders}


UNSUPPORTED = {"flan-t5-small", "mengzi-t5-base", "t5-base", "t5-small"}
UNSUPPORTED |= {"vit-base-eurosat-finetuned", "vit-base-patch16-224"}
WITHOUT_MODEL_TYPE = {"roberta-base-old"}


def test_every_real_config_builds_or_says_why(shared_dir):
    """With two layers: the names and shapes are transformers' own, where it has the model."""
    from mindpeft.models.auto import architecture

    found = real_configs(shared_dir)
    assert len(found) == 26
    for folder, values in found.items():
        if folder in UNSUPPORTED | WITHOUT_MODEL_TYPE:
            with pytest.raises(InputError, match="model_type"):
                architecture(values.get("model_type"), folder)
            continue
        layers = next(
            key for key in ("num_hidden_layers", "n_layer", "n_layers", "num_layers") if key in values
        )
        heads = architecture(values["model_type"], folder).HEADS
        config_class = heads["AutoModel"].config_class
        config = config_class.from_dict(values, **{layers: 2})
        written = config.to_dict()
        assert all(written.get(key) == value for key, value in values.items() if key != layers), folder
        names = {name: tuple(p.shape) for name, p in heads["AutoModel"](config).parameters_and_names()}
        if values["model_type"] in ("internlm2", "chatglm"):
            continue
        kept = {key: value for key, value in values.items() if key not in ("auto_map", layers)}
        with torch.device("meta"):
            theirs = transformers.AutoModel.from_config(
                transformers.AutoConfig.for_model(**{**kept, layers: 2})
            )
        assert names == {name: tuple(p.shape) for name, p in theirs.named_parameters()}, folder


def test_weight_indices_of_real_checkpoints_are_wholly_used(shared_dir):
    from mindpeft.convert.loader import hf_renamer
    from mindpeft.models.auto import architecture

    for folder in ("internlm2-1.8b", "qwen2.5-3b", "mistral-24b-dolphin3", "qwen2-14b-cogito"):
        values = json.loads((shared_dir / "configs" / folder / "config.json").read_text())
        index = json.loads((shared_dir / "configs" / folder / "model.safetensors.index.json").read_text())
        heads = architecture(values["model_type"], folder).HEADS
        model_class = heads["AutoModelForCausalLM"]
        config = model_class.config_class.from_dict(values, num_hidden_layers=2)
        names = {name for name, _ in model_class(config).parameters_and_names()}
        rename = hf_renamer(names, model_class.base_model_prefix)
        listed = {rename(name) for name in index["weight_map"] if ".layers." not in name or _layer(name) < 2}
        assert listed == names, folder


def _layer(name: str) -> int:
    return int(name.partition(".layers.")[2].partition(".")[0])


def test_stories260k(shared_dir, mode):
    """Logits go up to 22, so that float32 itself is wrong by 2e-5 at times: the truth is a run in float64."""
    folder = shared_dir / "checkpoints" / "stories260K"
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").eval()
    story = theirs.generate(torch.tensor([[1]]), max_new_tokens=199, do_sample=False).numpy().astype(np.int32)
    draws = np.random.default_rng(0).integers(3, 512, (2, 100)).astype(np.int32)
    texts = (story, draws)
    rounded = [run_theirs(theirs, input_ids=text).logits for text in texts]
    theirs = theirs.double()
    exact = [run_theirs(theirs, input_ids=text).logits.detach().numpy() for text in texts]
    ours = AutoModelForCausalLM.from_pretrained(folder)
    found = [run_ours(ours, input_ids=text) for text in texts]
    assert absolute_error(found[0], exact[0]) <= 2e-5
    for ours_logits, theirs_logits, truth in zip(found, rounded, exact, strict=True):
        assert mean_error(ours_logits, truth) <= 1.2 * mean_error(theirs_logits, truth)


def mean_error(found, expected: np.ndarray) -> float:
    """The root of the mean square."""
    return float(np.sqrt(np.mean((to_numpy(found) - expected) ** 2)))


def test_someone_elses_adapter_of_gpt2(shared_dir, tmp_path):
    """LoRA on c_attn with a trained classifier; the base here is random, of GPT-2's shape."""
    folder = shared_dir / "checkpoints" / "adapter_lora_gpt2_seqcls"
    saved = load_file(folder / "adapter_model.safetensors")
    labels = next(value.shape[0] for key, value in saved.items() if key.endswith("score.weight"))
    torch.manual_seed(0)
    config = transformers.GPT2Config(num_labels=labels, pad_token_id=50256)
    base = transformers.GPT2ForSequenceClassification(config)
    base.save_pretrained(tmp_path)
    theirs = peft.PeftModel.from_pretrained(base, folder).eval()
    ours = PeftModel.from_pretrained(AutoModelForSequenceClassification.from_pretrained(tmp_path), folder)
    ids = np.random.default_rng(0).integers(0, 50000, (2, 19)).astype(np.int32)
    expected = run_theirs(theirs, input_ids=ids).logits
    assert scaled_error(run_ours(ours, input_ids=ids), expected) <= 1e-5
    assert (expected - run_theirs(base.base_model, input_ids=ids)[0][:, -1, :1]).abs().max() > 1e-3
    ours.save_pretrained(tmp_path / "again")
    again = load_file(tmp_path / "again" / "adapter_model.safetensors")
    assert again.keys() == saved.keys()
    assert all(torch.equal(again[key], saved[key]) for key in saved)
