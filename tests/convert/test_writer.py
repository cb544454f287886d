"""Saving and converting checkpoints, with transformers as the reader."""

import json
import os
import shutil

import numpy as np
import pytest
import safetensors.torch
import torch
import transformers

from mindpeft.convert.checkpoint import open_checkpoint
from mindpeft.convert.tensors import LazyTensor, RawTensor
from mindpeft.convert.writer import convert_checkpoint, parse_size, save_checkpoint
from mindpeft.errors import InputError


def raw(*shape, seed=0):
    return RawTensor.from_numpy(np.random.default_rng(seed).normal(size=shape).astype(np.float32))


TENSORS = {f"w{i}": raw(10, 10, seed=i) for i in range(5)}  # 400 bytes each


def names_in(folder):
    return sorted(path.name for path in folder.iterdir())


def assert_same(folder, tensors):
    with open_checkpoint(folder) as checkpoint:
        assert set(checkpoint) == set(tensors)
        for name, tensor in tensors.items():
            got = checkpoint[name]
            assert (got.dtype, got.shape, got.data.tobytes()) == (
                tensor.dtype,
                tensor.shape,
                tensor.data.tobytes(),
            )


@pytest.fixture(scope="module")
def bert_dir(tmp_path_factory):
    """A tiny random BERT with a tokenizer's vocabulary and files that must not come along."""
    folder = tmp_path_factory.mktemp("bert")
    config = transformers.BertConfig(
        vocab_size=40, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24
    )
    torch.manual_seed(0)
    transformers.BertModel(config).save_pretrained(folder)
    (folder / "vocab.txt").write_text("[PAD]\n[UNK]\n")
    (folder / "tokenizer.model").write_bytes(b"sentencepiece")
    (folder / "training_args.bin").write_bytes(b"weights of no model")
    (folder / ".hidden").write_text("x")
    (folder / "onnx").mkdir()
    return folder


def test_one_file(tmp_path):
    written = save_checkpoint(tmp_path / "new", TENSORS.items())
    assert [path.name for path in written] == names_in(tmp_path / "new") == ["model.safetensors"]
    assert_same(tmp_path / "new", TENSORS)


def test_shards_and_index(tmp_path):
    steps = []
    save_checkpoint(tmp_path, TENSORS.items(), max_shard_size=900, progress=lambda *step: steps.append(step))
    shards = [f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)]
    assert names_in(tmp_path) == sorted([*shards, "model.safetensors.index.json"])
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == 2000
    assert index["weight_map"]["w4"] == shards[2]
    assert steps == [(f"w{i}", 400 * (i + 1), 2000) for i in range(5)]
    assert_same(tmp_path, TENSORS)
    for shard in shards:
        assert safetensors.safe_open(tmp_path / shard, framework="pt").metadata() == {"format": "pt"}


def test_a_tensor_larger_than_a_shard_gets_its_own(tmp_path):
    save_checkpoint(tmp_path, TENSORS.items(), max_shard_size=1)
    assert len(names_in(tmp_path)) == 6
    assert_same(tmp_path, TENSORS)


def test_an_earlier_save_is_removed(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    for size, count in [(500, 6), ("1KB", 4), ("5GB", 1), (900, 4), ("5GB", 1)]:
        save_checkpoint(tmp_path, TENSORS.items(), max_shard_size=size)
        assert len(names_in(tmp_path)) == count + 1
        assert_same(tmp_path, TENSORS)


def test_a_failed_save_leaves_the_earlier_one(tmp_path):
    def fail():
        raise InputError("no value")

    save_checkpoint(tmp_path, TENSORS.items(), max_shard_size=900)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    broken = {**TENSORS, "w9": LazyTensor("F32", (2,), fail)}
    for size in (900, "5GB"):
        with pytest.raises(InputError, match="no value"):
            save_checkpoint(tmp_path, broken.items(), max_shard_size=size)
        assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_the_index_appears_last(tmp_path, monkeypatch):
    order = []
    replace = os.replace
    monkeypatch.setattr(os, "replace", lambda a, b: (order.append(os.path.basename(b)), replace(a, b)))
    save_checkpoint(tmp_path, TENSORS.items(), max_shard_size=900)
    assert order[-1] == "model.safetensors.index.json"
    assert len(order) == 4


def test_two_tensors_of_one_name(tmp_path):
    with pytest.raises(InputError, match="two tensors named 'w0'"):
        save_checkpoint(tmp_path / "x", [*TENSORS.items(), ("w0", raw(1))], max_shard_size=500)
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize(
    ("text", "size"),
    [(7, 7), ("7", 7), ("5GB", 5 * 10**9), ("1.5 kb", 1500), ("2MiB", 2 << 20), ("1T", 10**12), ("9B", 9)],
)
def test_sizes(text, size):
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "GB", "5XB", "-1", 0, "0.1", "5 GB more", None])
def test_no_sizes(text):
    with pytest.raises(InputError, match="is no size"):
        parse_size(text)


def test_converted_folder_loads_in_transformers(bert_dir, tmp_path):
    written = convert_checkpoint(bert_dir, tmp_path / "out", max_shard_size="10KB")
    assert len(written) > 2
    before, after = (transformers.AutoModel.from_pretrained(path) for path in (bert_dir, tmp_path / "out"))
    for (name, expected), (again, got) in zip(
        before.state_dict().items(), after.state_dict().items(), strict=True
    ):
        assert name == again
        assert torch.equal(expected, got)
    companions = {name for name in names_in(tmp_path / "out") if not name.startswith("model")}
    assert companions == {"config.json", "vocab.txt", "tokenizer.model"}
    assert (tmp_path / "out" / "config.json").read_bytes() == (bert_dir / "config.json").read_bytes()


def test_the_real_minilm_converts_bit_by_bit(minilm_dir, tmp_path):
    convert_checkpoint(minilm_dir, tmp_path / "out", max_shard_size="30MB")
    with open_checkpoint(minilm_dir) as before, open_checkpoint(tmp_path / "out") as after:
        assert len(after.files) > 1
        assert set(before) == set(after)
        assert all(np.array_equal(before[name].data, after[name].data) for name in before)


@pytest.mark.parametrize("target", ["bf16", "float16"])
def test_conversion_of_the_dtype(target, bert_dir, tmp_path):
    convert_checkpoint(bert_dir, tmp_path / "out", dtype=target)
    model = transformers.AutoModel.from_pretrained(tmp_path / "out", dtype="auto")
    expected = transformers.AutoModel.from_pretrained(bert_dir)
    expected = expected.to({"bf16": torch.bfloat16, "float16": torch.float16}[target])
    for name, tensor in expected.state_dict().items():
        got = model.state_dict()[name]
        assert got.dtype == tensor.dtype
        assert torch.equal(got, tensor), name


@pytest.mark.parametrize("legacy", [False, True])
def test_bin_with_views_integers_and_all_floats(legacy, tmp_path):
    base = torch.randn(4, 6)
    tensors = {
        "view": base.t(),
        "shared": base,
        "half": torch.randn(3).half(),
        "bf16": torch.randn(3).bfloat16(),
        "f64": torch.randn(2).double(),
        "position_ids": torch.arange(5)[None],
        "flag": torch.tensor(True),
    }
    (tmp_path / "src").mkdir()
    path = tmp_path / "src" / "pytorch_model.bin"
    torch.save(tensors, path, _use_new_zipfile_serialization=not legacy)
    convert_checkpoint(tmp_path / "src", tmp_path / "same")
    loaded = safetensors.torch.load_file(tmp_path / "same" / "model.safetensors")
    for name, tensor in tensors.items():
        assert loaded[name].dtype == tensor.dtype
        assert torch.equal(loaded[name], tensor)
    convert_checkpoint(path, tmp_path / "narrow", dtype="F16")
    loaded = safetensors.torch.load_file(tmp_path / "narrow" / "model.safetensors")
    for name, tensor in tensors.items():
        assert torch.equal(loaded[name], tensor.half() if tensor.is_floating_point() else tensor)
    assert names_in(tmp_path / "narrow") == ["model.safetensors"]


def test_destination_is_protected(bert_dir, tmp_path):
    source = tmp_path / "a" / "model"
    shutil.copytree(bert_dir, source)
    full = tmp_path / "full"
    full.mkdir()
    (full / "mine.txt").write_text("keep")
    with pytest.raises(InputError, match="not empty"):
        convert_checkpoint(source, full)
    assert names_in(full) == ["mine.txt"]
    for place in (source, tmp_path / "a", source / ".." / "model", tmp_path):
        with pytest.raises(InputError, match="is or holds the source"):
            convert_checkpoint(source, place, overwrite=True)
    with pytest.raises(InputError, match="is a file"):
        convert_checkpoint(source, full / "mine.txt", overwrite=True)
    convert_checkpoint(source, full, overwrite=True)
    assert "mine.txt" not in names_in(full)
    (tmp_path / "empty").mkdir()
    convert_checkpoint(source, tmp_path / "empty")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dtype": "int8"}, "weights can't become I8; allowed: F64, F32, F16, BF16"),
        ({"dtype": "flot32"}, "unknown tensor dtype"),
        ({"max_shard_size": "many"}, "is no size"),
    ],
)
def test_bad_options_write_nothing(options, message, bert_dir, tmp_path):
    with pytest.raises(InputError, match=message):
        convert_checkpoint(bert_dir, tmp_path / "out", **options)
    assert names_in(tmp_path) == []


def test_damaged_source_writes_nothing(bert_dir, tmp_path):
    source = tmp_path / "src"
    shutil.copytree(bert_dir, source)
    weights = source / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-10])
    with pytest.raises(InputError, match="truncated"):
        convert_checkpoint(source, tmp_path / "out")
    assert names_in(tmp_path) == ["src"]


def test_full_disk_leaves_nothing(bert_dir, tmp_path, monkeypatch):
    def full(_descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(InputError, match=r"can't write .*No space left on device"):
        convert_checkpoint(bert_dir, tmp_path / "out")
    assert names_in(tmp_path) == []
