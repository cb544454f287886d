"""The `.bin` reader against torch.save in both formats, and against damaged archives."""

import io
import pickle
import random
import struct
import zipfile

import pytest
import torch

from mindpeft.convert.torch_file import TorchFile
from mindpeft.errors import InputError

BASE = torch.arange(24.0).reshape(4, 6)
TENSORS = {
    "base": BASE,
    "transposed": BASE.t(),
    "strided": BASE[1:, ::2],
    "offset": BASE[2],
    "column": BASE[:, 3],
    "permuted": torch.randn(2, 3, 4).permute(2, 0, 1),
    "expanded": torch.ones(1, 3).expand(4, 3),
    "zero_size": torch.zeros(0, 3),
    "zero_size_view": BASE[:, :0],
    "zero_dim": torch.tensor(3.5),
    "zero_dim_view": BASE[1, 2],
    "size_one": torch.randn(3, 1, 2)[:, :, 0:1],
    "f64": torch.randn(3, dtype=torch.float64),
    "f16": torch.randn(3).half(),
    "bf16": torch.randn(3, 2).bfloat16(),
    "bf16_transposed": torch.randn(3, 2).bfloat16().t(),
    "i64": torch.arange(5),
    "i32": torch.arange(5, dtype=torch.int32),
    "i16": torch.arange(5, dtype=torch.int16),
    "i8": torch.arange(-2, 3, dtype=torch.int8),
    "u8": torch.arange(5, dtype=torch.uint8),
    "bool": torch.tensor([True, False]),
    "parameter": torch.nn.Parameter(torch.randn(2, 2)),
    "frozen": torch.nn.Parameter(torch.randn(2), requires_grad=False),
}
NEW_DTYPES = {
    "u16": torch.tensor([1, 65535], dtype=torch.uint16),
    "u32": torch.tensor([[1, 2**31]], dtype=torch.uint32).t(),
    "u64": torch.tensor([2**63], dtype=torch.uint64),
}
EXTRAS = {"epoch": 3, "note": "text", "list": [1, 2.5], "size": torch.Size([1, 2]), "dtype": torch.bfloat16}


@pytest.fixture(params=["zip", "legacy"])
def save(request, tmp_path):
    def write(content, name="pytorch_model.bin"):
        path = tmp_path / name
        torch.save(content, path, _use_new_zipfile_serialization=request.param == "zip")
        return path

    return write


def bits(tensor):
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def test_every_kind_of_view_and_dtype(save):
    file = TorchFile(save({**TENSORS, **EXTRAS}))
    assert file.infos.keys() == TENSORS.keys()
    assert file.ignored == list(EXTRAS)
    for name, tensor in TENSORS.items():
        raw = file.read(name)
        assert raw.shape == tuple(tensor.shape) == file.infos[name].shape, name
        assert raw.data.tobytes() == bits(tensor), name


def test_unsigned_dtypes_of_newer_torch(tmp_path):
    torch.save(NEW_DTYPES, tmp_path / "x.pt")
    file = TorchFile(tmp_path / "x.pt")
    for name, tensor in NEW_DTYPES.items():
        assert file.read(name).data.tobytes() == bits(tensor)
        assert file.infos[name].dtype == name.upper()


@pytest.mark.parametrize("name", ["base", "transposed", "strided", "permuted", "expanded", "bf16", "i64"])
def test_leading_rows(name, save):
    file = TorchFile(save(TENSORS))
    for start, stop in [(0, 2), (1, 3), (1, 99), (2, 2), (1, None)]:
        expected = TENSORS[name][start:stop]
        raw = file.read(name, start, stop)
        assert (raw.shape, raw.data.tobytes()) == (tuple(expected.shape), bits(expected))


def test_module_state_dicts_with_tied_weights(save):
    model = torch.nn.Sequential(torch.nn.Embedding(5, 3), torch.nn.Linear(3, 5), torch.nn.BatchNorm1d(5))
    model[1].weight = model[0].weight
    file = TorchFile(save(model.state_dict()))
    for name, tensor in model.state_dict().items():
        assert file.read(name).data.tobytes() == bits(tensor)


@pytest.mark.parametrize("key", ["state_dict", "model"])
def test_wrapped_state_dicts(key, save):
    model = torch.nn.Linear(2, 3)
    file = TorchFile(save({"epoch": 3, key: {**model.state_dict(), "steps": 7}, "optimizer": {"lr": 0.1}}))
    assert list(file.infos) == ["weight", "bias"]
    assert sorted(file.ignored) == ["epoch", "optimizer", "steps"]


def test_pickle_protocols(tmp_path):
    for protocol in (2, 3, 4, 5):
        for new in (True, False):
            path = tmp_path / f"{protocol}{new}.bin"
            torch.save({"a": BASE.t()}, path, pickle_protocol=protocol, _use_new_zipfile_serialization=new)
            assert TorchFile(path).read("a").data.tobytes() == bits(BASE.t())


def test_whole_modules_are_refused_by_name(save):
    with pytest.raises(InputError, match=r"pytorch_model\.bin asks for torch\.nn\.modules\.linear\.Linear"):
        TorchFile(save(torch.nn.Linear(2, 2)))


def test_single_tensors_are_refused(save):
    with pytest.raises(InputError, match="holds a tensor; needed: a dictionary"):
        TorchFile(save(BASE))


def test_truncation_at_many_places(save, tmp_path):
    content = save(TENSORS).read_bytes()
    path = tmp_path / "cut.bin"
    places = {*range(0, len(content), 131), *range(40), *range(len(content) - 40, len(content))}
    for length in sorted(places):
        path.write_bytes(content[:length])
        with pytest.raises(InputError, match=r"cut\.bin"):
            TorchFile(path)


def test_flipped_bytes_never_raise_anything_else(save, tmp_path):
    content = save({"a": BASE.t(), "b": torch.randn(3, 2).half(), "epoch": 1}).read_bytes()
    chooser = random.Random(0)
    path = tmp_path / "flipped.bin"
    refused = 0
    for _ in range(600):
        damaged = bytearray(content)
        for _ in range(chooser.choice([1, 1, 4])):
            damaged[chooser.randrange(len(damaged))] = chooser.randrange(256)
        path.write_bytes(damaged)
        try:
            file = TorchFile(path)
            for name in file.infos:
                file.read(name)
        except InputError:
            refused += 1
    assert refused > 100


def rewrite(path, change=lambda name, data: data, compression=zipfile.ZIP_STORED, **extra):
    """Copy an archive, changing or dropping (None) entries."""
    source = zipfile.ZipFile(io.BytesIO(path.read_bytes()))
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name in source.namelist():
            data = change(name, source.read(name))
            if data is not None:
                archive.writestr(name, data)
        for name, data in extra.items():
            archive.writestr(name, data)
    return path


@pytest.fixture
def archive(tmp_path):
    path = tmp_path / "pytorch_model.bin"
    torch.save({"a": BASE, "b": BASE.t(), "epoch": 1}, path)
    return path


def test_rewritten_archive_is_read(archive):
    assert TorchFile(rewrite(archive)).read("b").data.tobytes() == bits(BASE.t())


ARCHIVES = {
    "compressed": ({"compression": zipfile.ZIP_DEFLATED}, "compressed"),
    "big-endian": ({"change": lambda n, d: b"big" if n.endswith("byteorder") else d}, "byte order b'big'"),
    "no pickle": ({"change": lambda n, d: None if n.endswith("data.pkl") else d}, "0 entries data.pkl"),
    "two pickles": ({"other/data.pkl": b"N."}, "2 entries data.pkl"),
    "no storage": ({"change": lambda n, d: None if "/data/" in n else d}, "data/0 is missing"),
    "short storage": ({"change": lambda n, d: d[:-4] if "/data/" in n else d}, "too short"),
    "wider stride": (
        {
            "change": lambda n, d: (
                d.replace(b"K\x06K\x01\x86", b"K\x07K\x01\x86") if n.endswith("data.pkl") else d
            )
        },
        "outside of its storage",
    ),
    "longer shape": (
        {
            "change": lambda n, d: (
                d.replace(b"K\x04K\x06\x86", b"K\x09K\x06\x86") if n.endswith("data.pkl") else d
            )
        },
        "outside of its storage",
    ),
}


@pytest.mark.parametrize("case", ARCHIVES)
def test_damaged_archives(case, archive):
    arguments, message = ARCHIVES[case]
    with pytest.raises(InputError, match=message):
        TorchFile(rewrite(archive, **arguments))


def test_expansion_bombs_are_refused(tmp_path):
    torch.save({"a": torch.ones(1).expand(1 << 30)}, tmp_path / "bomb.bin")
    with pytest.raises(InputError, match="expands 4 bytes to 4294967296"):
        TorchFile(tmp_path / "bomb.bin")


def legacy(*objects, tail=b""):
    return b"".join(pickle.dumps(item, 2) for item in objects) + tail


MAGIC = 0x1950A86A20F9469CFC6C
LITTLE = {"little_endian": True, "protocol_version": 1001}
LEGACY = {
    "another magic": (legacy(12345), "neither a zip archive nor the legacy format"),
    "another version": (legacy(MAGIC, 1002, LITTLE), "unknown version"),
    "no system": (legacy(MAGIC, 1001, []), "unknown version"),
    "big-endian": (legacy(MAGIC, 1001, {"little_endian": False}), "big-endian"),
    "no storages": (legacy(MAGIC, 1001, LITTLE, {}, 3), "list of storages"),
    "unknown storage": (
        legacy(MAGIC, 1001, LITTLE, {}, ["5"], tail=struct.pack("<q", 0)),
        "unknown or malformed",
    ),
    "no tensors": (legacy(MAGIC, 1001, LITTLE, {"a": 1}, []), "no dictionary of tensors"),
    "empty": (b"", "is empty"),
    "text": (b"version https://git-lfs.github.com/spec/v1\noid sha256:1\n", "no torch file"),
    "html": (b"<!doctype html><html></html>", "no torch file"),
    "zeros": (bytes(100), "no torch file"),
    "zip magic alone": (b"PK\x03\x04", "not a whole zip archive"),
    "system call": (b"cposix\nsystem\n(S'true'\ntR.", r"asks for posix\.system"),
}


@pytest.mark.parametrize("case", LEGACY)
def test_damaged_legacy_files(case, tmp_path):
    content, message = LEGACY[case]
    path = tmp_path / "pytorch_model.bin"
    path.write_bytes(content)
    with pytest.raises(InputError, match=message):
        TorchFile(path)
