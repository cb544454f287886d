"""Adapters of other projects: what they compute, written down in NumPy, against PEFT on what is converted."""

from __future__ import annotations

import json

import mindspore as ms
import numpy as np
import peft
import pytest
import torch
from safetensors.numpy import load_file, save_file

from mindpeft import BottleneckConfig, PeftModel, get_peft_model
from mindpeft.errors import InputError
from mindpeft.foreign.convert import convert_adapter
from mindpeft.foreign.mindformers import hugging_face_path
from tests.models.reference import make_reference, open_ours

LINEAR = [f"encoder.layer.{i}.attention.self.{name}" for i in range(3) for name in ("query", "value")]
WIDTH, VOCABULARY = 16, 23


def factors(path: str, rank: int) -> tuple[np.ndarray, np.ndarray]:
    """a (in, r) and b (r, out), as mlx-lm keeps them."""
    rng = np.random.default_rng(sum(map(ord, path)))
    size = VOCABULARY if path == "words" else WIDTH
    return tuple(rng.normal(0, 0.2, s).astype(np.float32) for s in ((size, rank), (rank, WIDTH)))


def changed_logits(twins, updates: dict[str, np.ndarray]) -> np.ndarray:
    """The torch twin's answer after adding updates (out, in) to its weights."""
    model = twins.make_torch()
    modules = dict(model.named_modules())
    with torch.no_grad():
        for path, update in updates.items():
            modules[path].weight += torch.tensor(update)
    return twins.torch_logits(model)


def assert_opens_in_both(twins, folder, expected):
    base = twins.make_torch()
    base.prepare_inputs_for_generation = None  # PEFT asks for it when the task is CAUSAL_LM
    theirs = peft.PeftModel.from_pretrained(base, folder).eval()
    np.testing.assert_allclose(twins.torch_logits(theirs), expected, atol=1e-5)
    ours = PeftModel.from_pretrained(twins.make_model(), folder)
    np.testing.assert_allclose(twins.logits(ours), expected, atol=1e-5)


def write_mlx(folder, tensors, **config):
    folder.mkdir()
    parameters = {"rank": 4, "scale": 3.5, "dropout": 0.1}
    (folder / "adapter_config.json").write_text(
        json.dumps({"fine_tune_type": "lora", "num_layers": 3, "lora_parameters": parameters, **config})
    )
    save_file(tensors, folder / "adapters.safetensors")


def mlx_tensors(ranks=None):
    tensors = {}
    for path in LINEAR:
        a, b = factors(path, ranks[path] if ranks else 4)
        tensors |= {f"{path}.lora_a": a, f"{path}.lora_b": b}
    return tensors


def test_mlx_lora(twins, tmp_path):
    ranks = {path: 2 if ".1." in path else 4 for path in LINEAR}
    write_mlx(tmp_path / "mlx", mlx_tensors(ranks), model="some/model")
    done = convert_adapter(tmp_path / "mlx", tmp_path / "peft", prefix="")
    assert (done.source_format, done.method, done.tensors) == ("mlx", "LORA", 12)
    updates = {path: 3.5 * (np.matmul(*factors(path, ranks[path]))).T for path in LINEAR}
    assert_opens_in_both(twins, tmp_path / "peft", changed_logits(twins, updates))
    config = json.loads((tmp_path / "peft" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["lora_dropout"]) == (4, 14, 0.1)
    assert (config["task_type"], config["base_model_name_or_path"]) == ("CAUSAL_LM", "some/model")


def test_mlx_dora(twins, tmp_path):
    magnitudes = {f"{path}.m": np.linspace(0.5, 2, WIDTH, dtype=np.float32) for path in LINEAR}
    write_mlx(tmp_path / "mlx", {**mlx_tensors(), **magnitudes}, fine_tune_type="dora")
    convert_adapter(tmp_path / "mlx", tmp_path / "peft")
    weights = dict(twins.make_torch().named_parameters())
    updates = {}
    for path in LINEAR:
        weight = weights[f"{path}.weight"].detach().numpy()
        adapted = weight + 3.5 * (np.matmul(*factors(path, 4))).T
        norm = np.linalg.norm(adapted, axis=1, keepdims=True)
        updates[path] = magnitudes[f"{path}.m"][:, None] * adapted / norm - weight
    assert_opens_in_both(twins, tmp_path / "peft", changed_logits(twins, updates))


def test_mlx_embedding(tmp_path):
    a, b = factors("words", 3)
    write_mlx(tmp_path / "mlx", {"model.embed_tokens.lora_a": a, "model.embed_tokens.lora_b": b})
    convert_adapter(tmp_path / "mlx", tmp_path / "peft")
    tensors = load_file(tmp_path / "peft" / "adapter_model.safetensors")
    stem = "base_model.model.model.embed_tokens.lora_embedding_"
    np.testing.assert_array_equal(tensors[f"{stem}A"], a.T)
    np.testing.assert_array_equal(tensors[f"{stem}B"], b.T)


@pytest.mark.parametrize("names", ["mindpet_delta_lora_{}", "lora_{}.weight", "lora_{}"])
def test_mindspore_checkpoints(twins, tmp_path, names):
    entries = [{"name": f"{LINEAR[0]}.weight", "data": ms.Tensor(np.zeros((16, 16), np.float32))}]
    for path in LINEAR:
        a, b = factors(path, 4)
        upper = names == "lora_{}.weight"
        pair = (a, b) if names == "lora_{}" else (a.T, b.T)
        for side, value in zip("AB" if upper else "ab", pair, strict=True):
            data = ms.Tensor(np.ascontiguousarray(value))
            entries.append({"name": f"{path}.{names.format(side)}", "data": data})
            entries.append({"name": f"adam_m.{path}.{names.format(side)}", "data": data})
    ms.save_checkpoint(entries, str(tmp_path / "rank_0.ckpt"))
    done = convert_adapter(tmp_path / "rank_0.ckpt", tmp_path / "peft", lora_alpha=6, base_model="base")
    assert (done.source_format, done.tensors) == ("mindformers", 12)
    updates = {path: 1.5 * (np.matmul(*factors(path, 4))).T for path in LINEAR}
    assert_opens_in_both(twins, tmp_path / "peft", changed_logits(twins, updates))


def test_names_of_mindformers():
    assert hugging_face_path("model.layers.3.attention.wq") == "model.layers.3.self_attn.q_proj"
    assert hugging_face_path("model.layers.3.feed_forward.w2") == "model.layers.3.mlp.down_proj"
    assert hugging_face_path("encoder.0.dense") == "encoder.0.dense"
    with pytest.raises(InputError, match="fuses matrices"):
        hugging_face_path("model.layers.0.attention.w_qkv")


def test_an_adapter_of_peft_is_rewritten(twins, tmp_path):
    options = {"r": 3, "target_modules": ["query", "words"], "init_lora_weights": False}
    theirs = peft.PeftModel(twins.make_torch(), peft.LoraConfig(**options))
    theirs.save_pretrained(tmp_path / "old", safe_serialization=False)
    assert (tmp_path / "old" / "adapter_model.bin").is_file()
    done = convert_adapter(tmp_path / "old", tmp_path / "new", base_model="elsewhere")
    assert (done.method, done.source_format) == ("LORA", "peft")
    assert_opens_in_both(twins, tmp_path / "new", twins.torch_logits(theirs))
    config = json.loads((tmp_path / "new" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "elsewhere"


def test_adapterhub_and_back(tmp_path):
    make_reference("sequence", tmp_path / "base")
    model = get_peft_model(open_ours("sequence", tmp_path / "base"), BottleneckConfig(task_type="SEQ_CLS"))
    model.save_pretrained(tmp_path / "ours")
    done = convert_adapter(tmp_path / "ours", tmp_path / "hub", to="adapterhub")
    assert (done.source_format, done.target_format, done.method) == ("peft", "adapterhub", "BOTTLENECK")
    back = convert_adapter(tmp_path / "hub", tmp_path / "back")
    assert back.source_format == "adapterhub"
    ours, again = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("ours", "back"))
    bottleneck = {name: value for name, value in ours.items() if "adapter_" in name}
    assert len(bottleneck) == 8
    for name, value in bottleneck.items():
        np.testing.assert_array_equal(again[name], value, err_msg=name)


def mlx_problem(folder, **changes):
    tensors = changes.pop("tensors", None) or mlx_tensors()
    write_mlx(folder, tensors, **changes)
    return folder


A, B = factors(LINEAR[0], 4)
PROBLEMS = {
    "full": (lambda p: mlx_problem(p, fine_tune_type="full"), "fine_tune_type 'full': only lora and dora"),
    "scale": (lambda p: mlx_problem(p, lora_parameters={"scale": "x"}), "scale must be a number"),
    "parameters": (lambda p: mlx_problem(p, lora_parameters=[1]), "lora_parameters must be an object"),
    "experts": (
        lambda p: mlx_problem(p, tensors={"e.lora_a": np.zeros((2, 4, 3)), "e.lora_b": np.zeros((2, 3, 4))}),
        "experts of a mixture",
    ),
    "lonely": (lambda p: mlx_problem(p, tensors={"q.lora_a": A}), "'q' has only lora_a"),
    "foreign": (lambda p: mlx_problem(p, tensors={"q.weight": A}), "'q.weight' are no tensors of LoRA"),
    "ranks": (lambda p: mlx_problem(p, tensors={"q.lora_a": A, "q.lora_b": B[:2]}), r"only \(in, r\)"),
    "half_dora": (
        lambda p: mlx_problem(p, tensors={**mlx_tensors(), f"{LINEAR[0]}.m": B[0]}),
        "some matrices have DoRA's magnitudes",
    ),
}


@pytest.mark.parametrize("name", PROBLEMS)
def test_broken_mlx_adapters(tmp_path, name):
    make, message = PROBLEMS[name]
    with pytest.raises(InputError, match=message):
        convert_adapter(make(tmp_path / "mlx"), tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["mlx"]


def write_ckpt(path, **tensors):
    entries = [{"name": n.replace("__", "."), "data": ms.Tensor(v.copy())} for n, v in tensors.items()]
    ms.save_checkpoint(entries, str(path))
    return path


@pytest.mark.parametrize(
    ("tensors", "alpha", "message"),
    [
        ({"q__weight": A}, 4, "holds no LoRA tensors"),
        ({"q__lora_a": A, "q__lora_b": B}, None, "give it with --lora-alpha"),
        ({"q__lora_a": A, "k__lora_b": B}, 4, "A without B, or B without A, at 'q' and 'k'|'q', 'k'"),
        ({"q__lora_a": np.zeros((2, 3, 4)), "q__lora_b": B}, 4, "no matrices"),
        ({"q__lora_a": np.zeros((5, 3)), "q__lora_b": np.zeros((4, 6))}, 4, "ranks can't be told"),
        ({"l__attention__w_qkv__lora_a": A, "l__attention__w_qkv__lora_b": B}, 4, "fuses matrices"),
    ],
)
def test_broken_checkpoints(tmp_path, tensors, alpha, message):
    path = write_ckpt(tmp_path / "a.ckpt", **tensors)
    with pytest.raises(InputError, match=message):
        convert_adapter(path, tmp_path / "out", lora_alpha=alpha)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("config", "options", "message"),
    [
        (None, {}, "holds no adapter_config.json"),
        ("[]", {}, "must hold a JSON object"),
        ("{", {}, "adapter_config.json"),
        ('{"r": 8}', {}, "of no known format"),
        ('{"peft_type": "LORA"}', {}, "neither adapter_model.safetensors"),
        ('{"peft_type": "LORA"}', {"to": "adapterhub"}, "no bottleneck adapter"),
        ('{"peft_type": "LORA"}', {"to": "mlx"}, "to must be one of peft, adapterhub"),
        ('{"fine_tune_type": "lora"}', {}, "holds no adapters.safetensors"),
    ],
)
def test_what_is_no_adapter(tmp_path, config, options, message):
    (tmp_path / "in").mkdir()
    if config is not None:
        (tmp_path / "in" / "adapter_config.json").write_text(config)
    with pytest.raises(InputError, match=message):
        convert_adapter(tmp_path / "in", tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()
    with pytest.raises(InputError, match="no such folder"):
        convert_adapter(tmp_path / "absent", tmp_path / "out")
