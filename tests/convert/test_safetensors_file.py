"""The safetensors reader and writer against the safetensors package, and against damaged files."""

import gc
import json
import mmap
import struct

import numpy as np
import pytest
import safetensors
import safetensors.torch
import torch

from mindpeft.convert import safetensors_file
from mindpeft.convert.safetensors_file import SafetensorsFile, write_safetensors
from mindpeft.convert.tensors import LazyTensor, RawTensor
from mindpeft.errors import InputError

TENSORS = {
    "f64": torch.randn(3, dtype=torch.float64),
    "f32": torch.randn(2, 3),
    "f16": torch.randn(5).half(),
    "bf16": torch.randn(4, 2).bfloat16(),
    "i64": torch.tensor([-(2**62), 5]),
    "i32": torch.tensor([[7]], dtype=torch.int32),
    "i16": torch.tensor([-3], dtype=torch.int16),
    "i8": torch.tensor([-3, 1, 2], dtype=torch.int8),
    "u64": torch.tensor([2**63], dtype=torch.uint64),
    "u32": torch.tensor([2**31], dtype=torch.uint32),
    "u16": torch.tensor([65535], dtype=torch.uint16),
    "u8": torch.tensor([255], dtype=torch.uint8),
    "bool": torch.tensor([True, False, True]),
    "scalar": torch.tensor(2.5),
    "empty": torch.zeros(0, 7),
}


def bits(tensor):
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def raw_file(path, header, data=b""):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)
    return path


def entry(dtype="F32", shape=(2,), offsets=(0, 8)):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


@pytest.fixture
def whole(tmp_path):
    path = tmp_path / "model.safetensors"
    safetensors.torch.save_file(TENSORS, path, metadata={"format": "pt", "note": "ü"})
    return path


def test_reads_what_the_package_wrote(whole):
    file = SafetensorsFile(whole)
    assert file.metadata == {"format": "pt", "note": "ü"}
    assert file.infos.keys() == TENSORS.keys()
    for name, tensor in TENSORS.items():
        raw = file.read(name)
        assert raw.shape == tuple(tensor.shape) == file.infos[name].shape
        assert raw.data.tobytes() == bits(tensor), name


def test_the_package_reads_what_we_wrote(whole, tmp_path):
    file = SafetensorsFile(whole)
    copy = tmp_path / "sub" / "copy.safetensors"
    write_safetensors(copy, ((name, file.read(name)) for name in file.infos))
    with safetensors.safe_open(copy, framework="pt") as opened:
        assert opened.metadata() == {"format": "pt"}
        assert set(opened.keys()) == TENSORS.keys()
        for name, tensor in TENSORS.items():
            got = opened.get_tensor(name)
            assert got.dtype == tensor.dtype
            assert got.shape == tensor.shape
            assert bits(got) == bits(tensor)


def test_leading_rows(whole):
    file = SafetensorsFile(whole)
    for start, stop in [(0, 2), (1, 3), (3, 9), (4, 4), (2, None)]:
        got = file.read("bf16", start, stop)
        assert got.data.tobytes() == bits(TENSORS["bf16"][start:stop])
        assert got.shape == tuple(TENSORS["bf16"][start:stop].shape)


needs_mapping = pytest.mark.skipif(not safetensors_file._MAPS, reason="files are not mapped here")


@needs_mapping
def test_mapped_as_read(whole):
    file = SafetensorsFile(whole)
    for name, tensor in TENSORS.items():
        raw = file.map(name)
        if name == "empty":
            assert raw is None
        else:
            assert (raw.dtype, raw.shape) == (file.infos[name].dtype, tuple(tensor.shape))
            assert raw.data.tobytes() == bits(tensor), name


@needs_mapping
def test_what_is_mapped_is_the_processes_own(whole):
    """It outlives the file, in which nothing that is written to it arrives."""
    file, content = SafetensorsFile(whole), whole.read_bytes()
    tensor = file.map("f32").to_mindspore()
    file.close()
    del file
    gc.collect()
    tensor[0, 1] = 7.0
    assert whole.read_bytes() == content
    whole.unlink()
    expected = TENSORS["f32"].numpy().copy()
    expected[0, 1] = 7.0
    np.testing.assert_array_equal(tensor.asnumpy(), expected)


def test_what_lies_askew_is_not_mapped(tmp_path):
    header = json.dumps({"a": entry("U8", (1,), (0, 1)), "w": entry(offsets=(1, 9))}).encode()
    path = raw_file(tmp_path / "x.safetensors", header + b" " * (-len(header) % 8), bytes(9))
    assert SafetensorsFile(path).map("w") is None


def test_where_nothing_can_be_mapped(whole, monkeypatch):
    def refuse(*_, **__):
        raise OSError("no such operation")

    file = SafetensorsFile(whole)
    with monkeypatch.context() as patch:
        patch.setattr(mmap, "mmap", refuse)
        assert file.map("f32") is None
    monkeypatch.setattr(safetensors_file, "_MAPS", False)
    assert file.map("f32") is None


def test_names_may_be_any_text(tmp_path):
    path = tmp_path / "x.safetensors"
    names = ["a b", "权重", 'quote"s', "n\n"]
    write_safetensors(path, [(name, RawTensor.from_numpy(np.ones(2, np.float32))) for name in names])
    assert sorted(safetensors.torch.load_file(path)) == sorted(names) == sorted(SafetensorsFile(path).infos)


def test_every_tensor_is_aligned_to_its_element(tmp_path):
    path = tmp_path / "x.safetensors"
    arrays = {"a": np.ones(3, np.uint8), "b": np.ones(1, np.float64), "c": np.ones(3, np.float16)}
    write_safetensors(path, ((name, RawTensor.from_numpy(array)) for name, array in arrays.items()))
    length = struct.unpack("<Q", path.read_bytes()[:8])[0]
    header = json.loads(path.read_bytes()[8 : 8 + length])
    assert length % 8 == 0
    for name, array in arrays.items():
        assert header[name]["data_offsets"][0] % array.itemsize == 0


def test_truncation_at_every_byte_is_an_input_error(whole, tmp_path):
    content = whole.read_bytes()
    path = tmp_path / "cut.safetensors"
    for length in range(len(content)):
        path.write_bytes(content[:length])
        with pytest.raises(InputError, match=r"cut\.safetensors"):
            SafetensorsFile(path)


def test_file_cut_after_opening(tmp_path):
    path = tmp_path / "x.safetensors"
    write_safetensors(path, [("w", RawTensor.from_numpy(np.ones(1 << 20, np.float32)))])
    file = SafetensorsFile(path)
    with open(path, "r+b") as handle:
        handle.truncate(1 << 21)
    for take in (file.read, *([file.map] if safetensors_file._MAPS else [])):
        with pytest.raises(InputError, match="truncated"):
            take("w")


DAMAGED = {
    "huge header": (struct.pack("<Q", 1 << 62) + b"{}", "more than the"),
    "header beyond the end": (struct.pack("<Q", 50) + b"{}", "truncated"),
    "too short": (b"abc", "3 bytes"),
    "not JSON": (b"{nonsense", "corrupt"),
    "not UTF-8": (b"\xff\xfe{}", "corrupt"),
    "deep JSON": (b"[" * 200_000, "corrupt"),
    "list": ([], "not a JSON object"),
    "giant number": (b'{"w":' + b"9" * 5000 + b"}", "corrupt"),
    "twice": (b'{"w":1,"w":1}', "twice"),
    "metadata of numbers": ({"__metadata__": {"a": 1}}, "text to text"),
    "metadata list": ({"__metadata__": []}, "text to text"),
    "entry no object": ({"w": 3}, "needs dtype"),
    "no dtype": ({"w": {"shape": [2], "data_offsets": [0, 8]}}, "needs dtype"),
    "unknown dtype": ({"w": entry("F8_E4M3", (8,))}, "F8_E4M3.*allowed: F64"),
    "dtype no text": ({"w": entry([], (8,))}, "allowed: F64"),
    "negative shape": ({"w": entry(shape=(-2,))}, "shape"),
    "fractional shape": ({"w": entry(shape=(2.0,))}, "shape"),
    "boolean shape": ({"w": entry(shape=(True, 2))}, "shape"),
    "impossible empty shape": ({"w": entry(shape=(2**62, 2**62, 0), offsets=(0, 0))}, "shape"),
    "shape and span differ": ({"w": entry(shape=(3,))}, "needs 12 bytes but spans 8"),
    "reversed offsets": ({"w": entry(offsets=(8, 0))}, "spans -8"),
    "three offsets": ({"w": entry(offsets=(0, 4, 8))}, "data_offsets"),
    "text offsets": ({"w": entry(offsets=("0", "8"))}, "data_offsets"),
    "outside": ({"w": entry(offsets=(8, 16))}, "ends at byte 16"),
    "overlap": ({"w": entry(shape=(1,), offsets=(0, 4)), "v": entry(shape=(1,), offsets=(2, 6))}, "overlaps"),
    "same place": ({"w": entry(), "v": entry()}, "overlaps"),
    "gap": ({"w": entry(shape=(1,), offsets=(4, 8))}, "gap"),
    "trailing bytes": ({"w": entry(shape=(1,), offsets=(0, 4))}, "4 bytes after"),
}


@pytest.mark.parametrize("case", DAMAGED)
def test_damaged_files_are_refused_in_one_sentence(case, tmp_path):
    content, message = DAMAGED[case]
    path = tmp_path / "bad.safetensors"
    if case in ("huge header", "header beyond the end", "too short"):
        path.write_bytes(content)
    else:
        raw_file(path, content, b"\0" * 8)
    with pytest.raises(InputError, match=message) as caught:
        SafetensorsFile(path)
    assert str(path) in str(caught.value)


def test_missing_file_and_folder(tmp_path):
    for path in (tmp_path / "absent.safetensors", tmp_path):
        with pytest.raises(InputError, match="can't read"):
            SafetensorsFile(path)


def test_failed_write_leaves_nothing(tmp_path):
    def fail():
        raise InputError("no value")

    good = RawTensor.from_numpy(np.ones(3, np.float32))
    with pytest.raises(InputError, match="no value"):
        write_safetensors(tmp_path / "x.safetensors", [("a", good), ("b", LazyTensor("F32", (3,), fail))])
    with pytest.raises(InputError, match="two tensors named 'a'"):
        write_safetensors(tmp_path / "x.safetensors", [("a", good), ("a", good)])
    assert list(tmp_path.iterdir()) == []


def test_a_file_of_gigabytes(tmp_path):
    """Of holes, but for its last tensor: offsets are no dimensions, whatever their product."""
    size = 3 << 30
    header = {
        "large": entry("U8", [size], [0, size]),
        "last": entry("U8", [4], [size, size + 4]),
    }
    path = raw_file(tmp_path / "model.safetensors", header)
    with open(path, "r+b") as file:
        file.seek(size, 2)
        file.write(b"abcd")
    opened = SafetensorsFile(path)
    assert opened.read("last").data.tobytes() == b"abcd"
    assert opened.read("large", size - 2, size).data.tobytes() == bytes(2)
    opened.close()


def test_lazy_value_must_keep_its_promise(tmp_path):
    lazy = LazyTensor("F32", (3,), lambda: RawTensor.from_numpy(np.ones(2, np.float32)))
    with pytest.raises(ValueError, match="promised"):
        write_safetensors(tmp_path / "x.safetensors", [("a", lazy)])
    assert list(tmp_path.iterdir()) == []
