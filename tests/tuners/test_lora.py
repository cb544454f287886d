"""LoRA against torch + peft on twin models: forward, gradients, files in both directions, numbers."""

from __future__ import annotations

import json

import mindspore as ms
import numpy as np
import peft
import pytest
import torch
from mindspore import Tensor, ops
from safetensors.numpy import load_file

from mindpeft import LoraConfig, PeftModel, get_peft_model
from mindpeft.config import PeftConfig
from mindpeft.errors import InputError

pytestmark = pytest.mark.usefixtures("graph_mode")

# Every option of ordinary LoRA, each with random B so that the adapter matters.
OPTIONS = {
    "plain": {"target_modules": ["query", "value"]},
    "default_targets": {},
    "rslora": {"target_modules": ["query"], "use_rslora": True, "r": 4},
    "lora_bias": {"target_modules": ["query", "dense"], "lora_bias": True},
    "bias_all": {"target_modules": ["query", "intermediate"], "bias": "all"},
    "bias_lora_only": {"target_modules": ["query", "intermediate"], "bias": "lora_only"},
    "bias_all_seq_cls": {"target_modules": ["query"], "bias": "all", "task_type": "SEQ_CLS"},
    "patterns": {
        "target_modules": ["query", "value"],
        "rank_pattern": {"query": 2, r"layer\.1\..*value": 6},
        "alpha_pattern": {"encoder.layer.0.attention.self.query": 32},
    },
    "layers": {"target_modules": ["query"], "layers_to_transform": [0, 2]},
    "layers_pattern": {"target_modules": ["dense"], "layers_to_transform": 1, "layers_pattern": "layer"},
    "regex": {"target_modules": r"encoder\.layer\.[01]\.attention\.self\.(query|key)"},
    "exclude": {"target_modules": ["query", "dense"], "exclude_modules": ["attention.output.dense"]},
    "all_linear": {"target_modules": "all-linear"},
    "all_linear_seq_cls": {"target_modules": "all-linear", "task_type": "SEQ_CLS"},
    "modules_to_save": {"target_modules": ["query"], "modules_to_save": ["classifier", "LayerNorm"]},
    "saved_embedding": {"target_modules": ["query"], "modules_to_save": ["kinds"]},
    "embeddings": {"target_modules": ["words", "kinds"]},
    "embedding_and_linear": {"target_modules": ["words", "key"], "use_rslora": True},
    "conv1d": {"target_modules": ["c_attn"], "fan_in_fan_out": True},
    "token_cls": {"target_modules": ["query"], "task_type": "TOKEN_CLS"},
    "dora": {"target_modules": ["query", "value", "intermediate"], "use_dora": True, "bias": "all"},
    "dora_conv1d": {"target_modules": ["c_attn"], "use_dora": True, "fan_in_fan_out": True, "r": 3},
    "dora_embeddings": {"target_modules": ["words", "kinds", "key"], "use_dora": True, "use_rslora": True},
}


def torch_peft(twins, options, folder=None):
    """The torch twin with a PEFT adapter of random values; saved if a folder is given."""
    torch.manual_seed(3)
    options = {"init_lora_weights": False, **options}
    # PEFT's task classes want a transformers model; the bare class wraps the same way once heads are named.
    if options.get("task_type") in ("SEQ_CLS", "TOKEN_CLS"):
        options = {**options, "modules_to_save": ["classifier", "score"]}
    model = peft.PeftModel(twins.make_torch(), peft.LoraConfig(**options))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.05)
    model.eval()
    if folder is not None:
        model.save_pretrained(folder)
    return model


def fresh(twins, options):
    """The MindSpore twin with a fresh adapter whose B isn't zero."""
    ms.set_seed(11)
    return get_peft_model(twins.make_model(), LoraConfig(**{"init_lora_weights": False, **options}))


@pytest.mark.parametrize("name", OPTIONS)
def test_opens_what_peft_wrote(twins, tmp_path, name):
    theirs = torch_peft(twins, OPTIONS[name], tmp_path)
    ours = PeftModel.from_pretrained(twins.make_model(), tmp_path)
    np.testing.assert_allclose(twins.logits(ours), twins.torch_logits(theirs), atol=1e-5)
    with ours.disable_adapter():
        np.testing.assert_allclose(twins.logits(ours), twins.torch_logits(twins.make_torch()), atol=1e-5)


@pytest.mark.parametrize("name", ["lora_bias", "bias_all_seq_cls", "embedding_and_linear", "conv1d"])
def test_pynative_gives_the_same(twins, tmp_path, name):
    theirs = torch_peft(twins, OPTIONS[name], tmp_path)
    ms.set_context(mode=ms.PYNATIVE_MODE)
    ours = PeftModel.from_pretrained(twins.make_model(), tmp_path)
    np.testing.assert_allclose(twins.logits(ours), twins.torch_logits(theirs), atol=1e-5)


@pytest.mark.parametrize("name", OPTIONS)
def test_peft_opens_what_we_wrote(twins, tmp_path, name):
    ours = fresh(twins, OPTIONS[name])
    for parameter in ours.trainable_params():
        value = parameter.asnumpy() + np.random.normal(0, 0.05, parameter.shape).astype(np.float32)
        parameter.set_data(Tensor(value))
    ours.save_pretrained(tmp_path)
    theirs = peft.PeftModel(twins.make_torch(), peft.PeftConfig.from_pretrained(tmp_path))
    theirs.load_adapter(tmp_path, "default")
    np.testing.assert_allclose(twins.torch_logits(theirs.eval()), twins.logits(ours), atol=1e-5)


@pytest.mark.parametrize("name", OPTIONS)
def test_same_files_as_peft(twins, tmp_path, name):
    torch_peft(twins, OPTIONS[name], tmp_path / "theirs")
    fresh(twins, OPTIONS[name]).save_pretrained(tmp_path / "ours")
    theirs, ours = (load_file(tmp_path / side / "adapter_model.safetensors") for side in ("theirs", "ours"))
    assert {k: (v.shape, v.dtype) for k, v in ours.items()} == {
        k: (v.shape, v.dtype) for k, v in theirs.items()
    }
    configs = [
        json.loads((tmp_path / side / "adapter_config.json").read_text()) for side in ("theirs", "ours")
    ]
    for config in configs:
        for key in ("target_modules", "exclude_modules"):
            if isinstance(config[key], list):
                config[key] = sorted(config[key])
        for key in ("auto_mapping", "base_model_name_or_path"):  # they name the twins' classes
            config.pop(key)
        if (
            name == "all_linear_seq_cls"
        ):  # PEFT knows the head of transformers' models only: tests/test_targets.py
            config.pop("target_modules")
    assert configs[1] == configs[0]


@pytest.mark.parametrize("name", OPTIONS)
def test_gradients_and_numbers_equal_pefts(twins, tmp_path, name):
    theirs = torch_peft(twins, OPTIONS[name], tmp_path)
    ours = PeftModel.from_pretrained(twins.make_model(), tmp_path, is_trainable=True)
    assert ours.get_nb_trainable_parameters() == theirs.get_nb_trainable_parameters()

    labels = np.array([0, 2, 1, 1])
    logits = theirs.get_base_model()(torch.tensor(twins.IDS))
    loss = torch.nn.functional.cross_entropy(logits, torch.tensor(labels))
    loss.backward()
    expected = {
        peft_name(key): value.grad.numpy()
        for key, value in theirs.named_parameters()
        if value.grad is not None
    }
    parameters = {file_name(ours, p): p for p in ours.trainable_params()}
    assert parameters.keys() == expected.keys()

    value, gradients = loss_and_gradients(ours, list(parameters.values()))(
        Tensor(twins.IDS), Tensor(labels, ms.int32)
    )
    assert float(value) == pytest.approx(float(loss), rel=1e-5)
    for key, found in zip(parameters, gradients, strict=True):
        scale = np.abs(expected[key]).max()
        np.testing.assert_allclose(found.asnumpy(), expected[key], atol=1e-4 * scale + 1e-7, err_msg=key)


def loss_and_gradients(model, parameters):
    def loss(ids, labels):
        return model(ids, labels)[0]

    return ms.value_and_grad(loss, None, parameters)


def peft_name(key):
    """PEFT's name in memory -> the base parameter's or slot tensor's name here."""
    key = key.removeprefix("base_model.model.").replace(".modules_to_save.default.", ".")
    key = key.replace(".base_layer.", ".").replace(".default", "")
    return key.replace("magnitude_vector.weight", "magnitude_vector")


def file_name(model, parameter):
    """A parameter's name with torch's leaf."""
    classic = {"gamma": "weight", "beta": "bias", "embedding_table": "weight"}
    head, _, leaf = parameter.name.rpartition(".")
    return f"{head}.{classic.get(leaf, leaf)}"


@pytest.mark.parametrize("kind", [True, False, "gaussian"])
@pytest.mark.parametrize("target", ["query", "words"])
def test_initial_values_are_distributed_as_pefts(twins, kind, target):
    ms.set_seed(0)
    options = {"target_modules": [target], "r": 64, "init_lora_weights": kind}
    ours = get_peft_model(twins.make_model(), LoraConfig(**options))
    torch.manual_seed(0)
    theirs = peft.PeftModel(twins.make_torch(), peft.LoraConfig(**options))
    expected = {peft_name(k): v.detach().numpy() for k, v in theirs.named_parameters() if v.requires_grad}
    for parameter in ours.trainable_params():
        mine, other = parameter.asnumpy(), expected[parameter.name]
        assert mine.shape == other.shape
        assert mine.std() == pytest.approx(other.std(), rel=0.15), parameter.name
        assert np.abs(mine).max() == pytest.approx(np.abs(other).max(), rel=0.4), parameter.name


def test_the_seed_decides_the_initial_values(twins):
    first, second = fresh(twins, {"r": 4}), fresh(twins, {"r": 4})
    for one, two in zip(first.trainable_params(), second.trainable_params(), strict=True):
        np.testing.assert_array_equal(one.asnumpy(), two.asnumpy())
    third = get_peft_model(twins.make_model(), LoraConfig(r=4))
    assert (third.trainable_params()[0].asnumpy() != first.trainable_params()[0].asnumpy()).any()


def test_a_fresh_adapter_changes_nothing(twins):
    expected = twins.logits(twins.make_model())
    np.testing.assert_array_equal(twins.logits(fresh(twins, {"init_lora_weights": True})), expected)


def test_dropout_acts_while_training_only(twins):
    model = fresh(twins, {"lora_dropout": 0.5})
    plain = fresh(twins, {"lora_dropout": 0.0})
    np.testing.assert_array_equal(twins.logits(model), twins.logits(plain))
    model.set_train(True)
    assert not np.array_equal(twins.logits(model), twins.logits(plain))
    assert not np.array_equal(twins.logits(model), twins.logits(model))


def test_half_precision_base_keeps_a_float32_adapter():
    dtype = ms.float16  # MindSpore multiplies no bfloat16 on CPU
    dense = ms.nn.Dense(8, 8, has_bias=False, dtype=dtype)
    cell = ms.nn.SequentialCell(dense)
    model = get_peft_model(cell, LoraConfig(target_modules=["0"], init_lora_weights=False, r=2))
    assert {str(p.dtype) for p in model.trainable_params()} == {"Float32"}
    x = Tensor(np.random.default_rng(0).normal(size=(3, 8)).astype(np.float16))
    y = model(x)
    assert y.dtype == dtype
    a, b = (p.asnumpy() for p in model.trainable_params())
    weight = dense.weight.asnumpy().astype(np.float32)
    expected = x.asnumpy().astype(np.float32) @ (weight + 4 * b @ a).T
    np.testing.assert_allclose(y.asnumpy(), expected, atol=2e-2)
    same = get_peft_model(
        ms.nn.SequentialCell(ms.nn.Dense(8, 8, dtype=dtype)),
        LoraConfig(target_modules=["0"], r=2),
        autocast_adapter_dtype=False,
    )
    assert {str(p.dtype) for p in same.trainable_params()} == {"Float16"}


def test_padding_a_slot_never_trains(twins):
    """Rows and columns of zeros beyond an adapter's rank get zero gradients, so a step leaves them zero."""
    model = get_peft_model(
        twins.make_model(),
        LoraConfig(r=2, init_lora_weights=False, target_modules=["query", "words"]),
        slot_rank=5,
    )
    parameters = model.trainable_params()
    gradient = loss_and_gradients(model, parameters)
    for _ in range(3):
        _, grads = gradient(Tensor(twins.IDS), Tensor([0, 2, 1, 1], ms.int32))
        for parameter, grad in zip(parameters, grads, strict=True):
            parameter.set_data(parameter - 0.1 * grad)
    for parameter in parameters:
        value = parameter.asnumpy()
        rank_axis = 0 if parameter.name.endswith(("lora_A.weight", "embedding_A")) else 1
        assert value.shape[rank_axis] == 5
        assert np.abs(value.take([0, 1], rank_axis)).max() > 0
        assert np.abs(value.take([2, 3, 4], rank_axis)).max() == 0


def test_gradient_reaches_only_the_adapter(twins):
    model = fresh(twins, {"target_modules": ["query"]})
    assert all("lora_" in p.name for p in model.trainable_params())
    assert ops.shape(model.trainable_params()[0])[0] == 8


def test_refuses_cells_that_it_cannot_wrap(twins):
    with pytest.raises(InputError, match=r"LoRA can't wrap the cell 'LayerNorm' of class LayerNorm"):
        get_peft_model(twins.make_model(), LoraConfig(target_modules="LayerNorm"))
    fused = ms.nn.SequentialCell(ms.nn.Dense(4, 4, activation="relu"))
    with pytest.raises(InputError, match="its activation is fused"):
        get_peft_model(fused, LoraConfig(target_modules=["0"]))
    with pytest.raises(InputError, match="lora_bias is not possible for the embedding 'words'"):
        get_peft_model(twins.make_model(), LoraConfig(target_modules=["words"], lora_bias=True))


def test_config_of_a_written_adapter_reads_back(twins, tmp_path):
    model = fresh(twins, OPTIONS["patterns"])
    model.save_pretrained(tmp_path)
    config = PeftConfig.from_pretrained(tmp_path)
    assert config.rank_pattern == OPTIONS["patterns"]["rank_pattern"]
    assert config.base_model_name_or_path == "twins/tiny"
    assert config.inference_mode is True
