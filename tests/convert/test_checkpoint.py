"""Opening folders, files and indexes."""

import json

import mindspore as ms
import numpy as np
import pytest
import safetensors.torch
import torch

from mindpeft.convert.checkpoint import open_checkpoint
from mindpeft.convert.safetensors_file import _MAPS
from mindpeft.convert.tensors import RawTensor
from mindpeft.errors import InputError

ONE = {"a": torch.randn(3, 4), "b": torch.randn(5).bfloat16()}
TWO = {"c": torch.randn(2, 2).half(), "d": torch.arange(4)}
INDEXES = {"safetensors": "model.safetensors.index.json", "bin": "pytorch_model.bin.index.json"}


def bits(tensor):
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def save(tensors, path):
    if path.suffix == ".safetensors":
        safetensors.torch.save_file(tensors, path, metadata={"format": "pt"})
    else:
        torch.save(tensors, path)


def write_index(folder, weight_map, kind="safetensors"):
    path = folder / INDEXES[kind]
    path.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return path


@pytest.fixture(params=["safetensors", "bin"])
def sharded(request, tmp_path):
    kind = request.param
    names = [f"model-0000{i}-of-00002.{kind}" for i in (1, 2)]
    for name, tensors in zip(names, (ONE, TWO), strict=True):
        save(tensors, tmp_path / name)
    write_index(tmp_path, {**dict.fromkeys(ONE, names[0]), **dict.fromkeys(TWO, names[1])}, kind)
    return tmp_path


def test_shards_of_both_kinds(sharded):
    with open_checkpoint(sharded) as checkpoint:
        everything = {**ONE, **TWO}
        assert checkpoint.names() == list(checkpoint) == list(everything)
        assert checkpoint.parameters == 12 + 5 + 4 + 4
        assert checkpoint.total_bytes == 48 + 10 + 8 + 32
        assert [file.parent for file in checkpoint.files] == [sharded, sharded]
        for name, tensor in everything.items():
            assert checkpoint[name].data.tobytes() == bits(tensor)
            assert checkpoint.info(name).shape == tuple(tensor.shape)


def test_mapped_from_safetensors_alone(sharded):
    with open_checkpoint(sharded) as checkpoint:
        for name, tensor in {**ONE, **TWO}.items():
            raw = checkpoint.mapped(name)
            assert (raw is not None) == (_MAPS and checkpoint.files[0].suffix == ".safetensors")
            assert raw is None or raw.data.tobytes() == bits(tensor)
        with pytest.raises(InputError, match="no tensor 'e'"):
            checkpoint.mapped("e")


def test_an_index_may_be_named_itself(sharded):
    index = next(sharded.glob("*.index.json"))
    assert len(open_checkpoint(index)) == 4


def test_the_real_minilm_equals_torch(minilm_dir):
    expected = safetensors.torch.load_file(minilm_dir / "model.safetensors")
    with open_checkpoint(minilm_dir) as checkpoint:
        assert checkpoint.names() == list(checkpoint._open_files[0].infos)
        assert set(checkpoint) == set(expected)
        assert checkpoint.metadata == {"format": "pt"}
        for name, tensor in expected.items():
            assert torch.equal(torch.from_numpy(checkpoint[name].numpy()), tensor)


def test_the_first_of_hugging_faces_order_is_taken(tmp_path):
    save(TWO, tmp_path / "pytorch_model.bin")
    assert set(open_checkpoint(tmp_path)) == set(TWO)
    save(ONE, tmp_path / "model.safetensors")
    assert set(open_checkpoint(tmp_path)) == set(ONE)


@pytest.mark.parametrize(
    "name", ["adapter_model.safetensors", "adapter_model.bin", "any.pt", "lightning.ckpt"]
)
def test_single_files(name, tmp_path):
    save(ONE, tmp_path / name)
    with open_checkpoint(tmp_path / name) as checkpoint:
        assert checkpoint.read("b").data.tobytes() == bits(ONE["b"])


def test_mindspore_checkpoints(tmp_path):
    path = tmp_path / "net.ckpt"
    values = {"w": ms.Tensor(np.arange(6).reshape(2, 3), ms.bfloat16), "n": ms.Tensor(3, ms.int32)}
    ms.save_checkpoint([{"name": name, "data": value} for name, value in values.items()], str(path))
    with open_checkpoint(path) as checkpoint:
        assert checkpoint.info("w").dtype == "BF16"
        assert checkpoint["w"].numpy().tolist() == [[0, 1, 2], [3, 4, 5]]
        assert checkpoint.read("w", "F32").numpy().tolist() == [[0, 1, 2], [3, 4, 5]]
        assert checkpoint["n"].numpy() == 3


@pytest.mark.parametrize("content", [b"", b"nonsense", bytes(200)])
def test_damaged_mindspore_checkpoints(content, tmp_path):
    path = tmp_path / "net.ckpt"
    path.write_bytes(content)
    with pytest.raises(InputError, match=r"net\.ckpt"):
        open_checkpoint(path)


@pytest.mark.parametrize("target", ["F32", "F16", "BF16", "F64"])
@pytest.mark.parametrize("file_name", ["x.safetensors", "x.bin"])
def test_reading_with_conversion(target, file_name, tmp_path, monkeypatch):
    monkeypatch.setattr("mindpeft.convert.checkpoint._CHUNK", 40)
    tensors = {"m": torch.randn(7, 5), "v": torch.randn(100), "s": torch.tensor(1.1), "e": torch.zeros(0, 3)}
    save(tensors, tmp_path / file_name)
    with open_checkpoint(tmp_path / file_name) as checkpoint:
        for name, tensor in tensors.items():
            whole = RawTensor.from_numpy(tensor.numpy()).astype(target)
            got = checkpoint.read(name, target)
            assert (got.dtype, got.shape, got.data.tobytes()) == (target, whole.shape, whole.data.tobytes())


def test_unknown_tensors(tmp_path):
    save(ONE, tmp_path / "model.safetensors")
    checkpoint = open_checkpoint(tmp_path)
    assert "zz" not in checkpoint
    assert checkpoint.get("zz") is None
    with pytest.raises(InputError, match="no tensor 'aa'; did you mean 'a'"):
        checkpoint.info("aa")


def test_non_tensors_are_listed(tmp_path):
    save({**ONE, "epoch": 3}, tmp_path / "x.bin")
    assert open_checkpoint(tmp_path / "x.bin").ignored == ["epoch"]


def test_missing_places(tmp_path):
    with pytest.raises(InputError, match="no such file or folder"):
        open_checkpoint(tmp_path / "absent")
    with pytest.raises(
        InputError, match=r"holds no weights; looked for model\.safetensors, .*pytorch_model\.bin"
    ):
        open_checkpoint(tmp_path)


def test_missing_shard_is_named_before_any_is_opened(sharded):
    index = next(sharded.glob("*.index.json"))
    first, second = sorted(set(json.loads(index.read_text())["weight_map"].values()))
    (sharded / second).unlink()
    (sharded / first).write_bytes(b"damaged")
    with pytest.raises(InputError, match=rf"names the file {second}, which is missing"):
        open_checkpoint(sharded)


def test_index_and_shard_disagree(sharded):
    index = next(sharded.glob("*.index.json"))
    weight_map = json.loads(index.read_text())["weight_map"]
    index.write_text(json.dumps({"weight_map": {**weight_map, "zz": weight_map["a"]}}))
    with pytest.raises(InputError, match=r"places tensor 'zz' in .*, which doesn't hold it"):
        open_checkpoint(sharded)


@pytest.mark.parametrize(
    "shard",
    [
        "../../x",
        "../x.safetensors",
        "a/../../x.safetensors",
        "/etc/passwd",
        "C:\\x.safetensors",
        "..\\x.safetensors",
        "\\\\host\\x.safetensors",
        "x\0.safetensors",
        "",
        3,
        None,
        ["x"],
    ],
)
def test_shards_may_not_leave_the_folder(shard, tmp_path):
    save(ONE, tmp_path / "x.safetensors")
    folder = tmp_path / "deep" / "model"
    folder.mkdir(parents=True)
    write_index(folder, {"a": shard})
    with pytest.raises(InputError, match="which is not a file of its folder"):
        open_checkpoint(folder)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "not valid JSON"),
        ("{", "not valid JSON"),
        ("[]", "needs a weight_map"),
        ("{}", "needs a weight_map"),
        ('{"weight_map": []}', "needs a weight_map"),
        ('{"weight_map": {}}', "needs a weight_map"),
        ("[" * 200_000, "can't read|not valid JSON"),
        ("9" * 5000, "can't read|needs a weight_map"),
        ('{"weight_map": {"a": "' + "x" * 5000 + '"}}', "missing"),
        ('{"weight_map": {"a": "."}}', "missing"),
    ],
)
def test_damaged_indexes(text, message, tmp_path):
    (tmp_path / INDEXES["safetensors"]).write_text(text)
    with pytest.raises(InputError, match=message):
        open_checkpoint(tmp_path)
