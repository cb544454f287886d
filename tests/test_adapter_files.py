"""Adapter folders: where things are written, what is accepted, and what is refused in one sentence."""

from __future__ import annotations

import json

import mindspore as ms
import numpy as np
import peft
import pytest
import torch
from mindspore import nn
from safetensors.numpy import load_file, save_file
from safetensors.torch import load_file as load_torch

from mindpeft import LoraConfig, PeftModel, get_peft_model
from mindpeft.adapter_files import base_name, is_stray, own_name, read_tensors
from mindpeft.errors import InputError
from mindpeft.parameters import base_places

pytestmark = pytest.mark.usefixtures("graph_mode")

WEIGHTS = "adapter_model.safetensors"
QUERY = "base_model.model.encoder.layer.0.attention.self.query"


@pytest.fixture
def folder(twins, tmp_path):
    """A saved adapter on query, with a head."""
    config = LoraConfig(r=2, target_modules=["query"], task_type="SEQ_CLS", init_lora_weights=False)
    get_peft_model(twins.make_model(), config).save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


def edit(folder, change):
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})


def test_names_both_ways():
    wrapped = {"a.query"}
    for name in ("a.query.bias", "a.norm.bias", "bias"):
        assert base_name(own_name(name, wrapped)) == name
    assert own_name("a.query.bias", wrapped) == "a.query.base_layer.bias"
    assert is_stray("classifier.original_module.bias")
    assert not is_stray("classifier.bias")


def test_classic_names_become_torchs():
    cell = nn.SequentialCell(nn.LayerNorm((4,)), nn.Embedding(3, 4), nn.BatchNorm1d(4), nn.Dense(4, 4))
    norm = {"weight", "bias", "running_mean", "running_var"}
    assert set(torch.nn.BatchNorm1d(4).state_dict()) - {"num_batches_tracked"} == norm
    expected = {"0.weight", "0.bias", "1.weight", *(f"2.{name}" for name in norm), "3.weight", "3.bias"}
    assert set(base_places(cell)) == expected


def test_folders_of_several_adapters(twins, tmp_path):
    model = get_peft_model(twins.make_model(), LoraConfig(r=2))
    model.add_adapter("second", LoraConfig(r=3))
    model.save_pretrained(tmp_path / "all")
    files = {
        str(path.relative_to(tmp_path / "all")) for path in (tmp_path / "all").rglob("*") if path.is_file()
    }
    assert files == {f"{d}{n}" for d in ("", "second/") for n in (WEIGHTS, "adapter_config.json")}
    model.save_pretrained(tmp_path / "one", selected_adapters=["second"])
    assert not (tmp_path / "one" / WEIGHTS).exists()
    true_rank = load_file(tmp_path / "all" / WEIGHTS)[f"{QUERY}.lora_A.weight"].shape
    assert true_rank == (2, twins.WIDTH)  # the slot holds 3


def test_metadata_and_config_without_a_task(twins, tmp_path):
    get_peft_model(twins.make_model(), LoraConfig()).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["auto_mapping"] == {"base_model_class": "Model", "parent_library": "transformers"}
    assert config["inference_mode"] is True
    assert config["target_modules"] == ["query", "value"]
    header = (tmp_path / WEIGHTS).read_bytes()[8:200]
    assert b'"__metadata__":{"format":"pt"}' in header


def test_values_round_trip_bit_by_bit(twins, folder, tmp_path):
    model = PeftModel.from_pretrained(twins.make_model(), folder)
    model.save_pretrained(tmp_path / "again")
    first, second = load_file(folder / WEIGHTS), load_file(tmp_path / "again" / WEIGHTS)
    assert first.keys() == second.keys()
    for name, value in first.items():
        np.testing.assert_array_equal(second[name], value)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_dtypes_and_bin_files(twins, folder, dtype):
    tensors = {name: value.to(dtype) for name, value in load_torch(folder / WEIGHTS).items()}
    torch.save(tensors, folder / "adapter_model.bin")
    (folder / WEIGHTS).unlink()
    model = PeftModel.from_pretrained(twins.make_model(), folder)
    for parameter in model.get_parameters():
        if "lora_" in parameter.name:
            assert parameter.dtype == ms.float32
            expected = tensors[f"base_model.model.{parameter.name}"].float().numpy()
            np.testing.assert_array_equal(parameter.asnumpy(), expected)


def test_safetensors_come_first(folder):
    (folder / "adapter_model.bin").write_bytes(b"not read")
    assert "classifier.weight" in read_tensors(folder, LoraConfig())


def test_what_peft_saves_besides_is_accepted(twins, folder):
    """A saved embedding equal to the base's, and the twins that bias="all" leaks."""
    words = twins.make_model().words.embedding_table.asnumpy()

    def add(tensors):
        tensors["base_model.model.words.base_layer.weight"] = words
        tensors["base_model.model.classifier.original_module.bias"] = np.ones(3, np.float32)
        tensors["base_model.model.classifier.modules_to_save.bias"] = np.ones(3, np.float32)

    expected = twins.logits(PeftModel.from_pretrained(twins.make_model(), folder))
    edit(folder, add)
    model = PeftModel.from_pretrained(twins.make_model(), folder)
    np.testing.assert_array_equal(twins.logits(model), expected)
    assert "words.weight" not in model._bank.own


def test_a_saved_embedding_that_differs_belongs_to_the_adapter(twins, folder):
    def add(tensors):
        tensors["base_model.model.words.weight"] = np.zeros((twins.VOCABULARY, twins.WIDTH), np.float32)

    base = twins.logits(twins.make_model())
    edit(folder, add)
    model = PeftModel.from_pretrained(twins.make_model(), folder)
    assert not model.words.embedding_table.asnumpy().any()
    with model.disable_adapter():
        np.testing.assert_array_equal(twins.logits(model), base)


def test_embedding_named_as_language_models_do(tmp_path):
    """PEFT then writes the whole embedding too; the adapter stays small in memory."""
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=20, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2
    )
    theirs = transformers.LlamaForCausalLM(config)
    peft.get_peft_model(theirs, peft.LoraConfig(target_modules=["embed_tokens"])).save_pretrained(tmp_path)
    tensors = read_tensors(tmp_path, LoraConfig())
    assert "model.embed_tokens.base_layer.weight" in tensors

    class Inner(nn.Cell):
        def __init__(self):
            super().__init__()
            self.embed_tokens = nn.Embedding(20, 8)

    class Outer(nn.Cell):
        def __init__(self):
            super().__init__()
            self.model = Inner()

    model = Outer()
    model.model.embed_tokens.embedding_table.set_data(
        ms.Tensor(tensors["model.embed_tokens.base_layer.weight"])
    )
    ours = PeftModel.from_pretrained(model, tmp_path)
    assert ours._bank.own == {}


def drop(name):
    return lambda tensors: tensors.pop(name)


def put(name, *shape):
    return lambda tensors: tensors.update({name: np.zeros(shape, np.float32)})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            drop(f"{QUERY}.lora_A.weight"),
            "tensors missing from the file: 'encoder.layer.0.*query.lora_A.weight'$",
        ),
        (drop("base_model.model.classifier.bias"), "missing from the file: 'classifier.bias'"),
        (
            put(f"{QUERY}.lora_A.weight", 2, 9),
            r"another base model\?\): '.*lora_A.weight' is \(2, 9\) in the file and \(2, 16\) in",
        ),
        (
            put("base_model.model.classifier.weight", 5, 16),
            r"'classifier.weight' is \(5, 16\) in the file and \(3, 16\)",
        ),
        (
            put("base_model.model.words.weight", 99, 16),
            r"'words.weight' is \(99, 16\) in the file and \(23, 16\)",
        ),
        (put("base_model.model.zip.lora_A.weight", 2, 2), "no place for: 'zip.lora_A.weight'"),
        (put(f"{QUERY}.lora_magnitude_vector", 16), "no place for: 'encoder.*lora_magnitude_vector'"),
        (
            put("prompt_embeddings", 2, 2),
            "tensor names must start with 'base_model.model.', but 'prompt_embeddings'",
        ),
    ],
)
def test_files_that_do_not_fit(twins, folder, change, message):
    edit(folder, change)
    model = twins.make_model()
    with pytest.raises(InputError, match=message) as error:
        PeftModel.from_pretrained(model, folder)
    assert "\n" not in str(error.value)
    assert str(folder) in str(error.value)
    assert all(parameter.requires_grad for parameter in model.get_parameters())
    assert not any("lora" in name for name, _ in model.parameters_and_names())


def test_an_adapter_for_another_base_reports_shapes(folder):
    class Other(nn.Cell):
        def __init__(self):
            super().__init__()
            self.query = nn.Dense(32, 32)
            self.classifier = nn.Dense(32, 2)

    with pytest.raises(
        InputError, match=r"'classifier.weight' is \(3, 16\) in the file and \(2, 32\) in the model"
    ):
        PeftModel.from_pretrained(Other(), folder)


def test_bad_folders(twins, folder, tmp_path):
    model = twins.make_model()
    with pytest.raises(InputError, match="no such adapter folder"):
        PeftModel.from_pretrained(model, tmp_path / "nowhere")
    (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes()[:-50])
    with pytest.raises(InputError, match="truncated"):
        PeftModel.from_pretrained(model, folder)
    (folder / WEIGHTS).unlink()
    with pytest.raises(
        InputError, match=r"holds no adapter: neither adapter_model\.safetensors nor adapter_model\.bin"
    ):
        PeftModel.from_pretrained(model, folder)
    blocked = tmp_path / "file"
    blocked.write_text("")
    with pytest.raises(InputError, match="can't write"):
        get_peft_model(model, LoraConfig()).save_pretrained(blocked)


def test_load_adapter_checks_before_touching(twins, folder):
    model = PeftModel.from_pretrained(twins.make_model(), folder)
    before = twins.logits(model)
    edit(folder, drop(f"{QUERY}.lora_A.weight"))
    with pytest.raises(InputError, match="missing from the file"):
        model.load_adapter(folder, "second")
    assert list(model.peft_config) == ["default"]
    np.testing.assert_array_equal(twins.logits(model), before)
