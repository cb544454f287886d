"""Hostile pickles: each is refused by name, and nothing that it asks for happens."""

import builtins
import io
import os
import pickle
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from mindpeft.convert.torch_pickle import _allowed_names, state_dict, unpickle
from mindpeft.errors import InputError

PATH = Path("pytorch_model.bin")


class Call:
    """Pickles as a call of ``function``."""

    def __init__(self, function, *arguments):
        self.reduced = function, arguments

    def __reduce__(self):
        return self.reduced


def read(data):
    return unpickle(io.BytesIO(data), PATH)[0]


GADGETS = {
    "os.system": (lambda mark: Call(os.system, f"touch {mark}"), f"{os.system.__module__}.system"),
    "eval": (lambda mark: Call(eval, f"open({mark!r}, 'w')"), "(builtins|__builtin__).eval"),
    "exec": (lambda mark: Call(exec, f"open({mark!r}, 'w')"), "(builtins|__builtin__).exec"),
    "open": (lambda mark: Call(open, mark, "w"), r"io\.open"),
    "subprocess": (lambda mark: Call(subprocess.call, ["touch", mark]), "subprocess.call"),
    "getattr": (lambda mark: Call(getattr, os, "system"), None),
    "import": (lambda mark: Call(builtins.__import__, "os"), "__import__"),
    "numpy array": (lambda mark: np.ones(3), r"numpy\.core\.multiarray\._reconstruct|numpy.*_frombuffer"),
    "numpy object array": (lambda mark: np.array([Call(os.system, f"touch {mark}")], object), "numpy|system"),
    "numpy load": (lambda mark: Call(np.load, mark), "numpy"),
    "torch load": (lambda mark: Call(torch.load, mark), r"torch\.serialization\.load"),
    "nested storage": (lambda mark: Call(torch.storage._load_from_bytes, b"x"), "_load_from_bytes"),
    "torch module": (lambda mark: torch.nn.Linear(2, 2), "torch.nn.modules.linear.Linear"),
    "sparse tensor": (lambda mark: torch.eye(2).to_sparse(), "_rebuild_sparse_tensor"),
    "namespace": (lambda mark: Path(mark), "pathlib"),
    "inside a list": (lambda mark: [1, {"a": (Call(os.system, f"touch {mark}"),)}], "system"),
}


@pytest.mark.parametrize("protocol", [2, 4])
@pytest.mark.parametrize("case", GADGETS)
def test_gadgets_are_refused_by_name(case, protocol, tmp_path):
    make, name = GADGETS[case]
    mark = tmp_path / "executed"
    if case == "getattr":
        data = b"cbuiltins\ngetattr\n(cos\nsystem\nS'x'\ntR."
        name = "builtins.getattr"
    else:
        data = pickle.dumps({"weight": make(str(mark))}, protocol=protocol, fix_imports=False)
    with pytest.raises(InputError, match=rf"pytorch_model\.bin asks for .*({name})"):
        read(data)
    assert not mark.exists()


@pytest.mark.parametrize(
    "data",
    [
        b"ccollections\nOrderedDict.fromkeys\n.",
        b"\x80\x04\x8c\x0bcollections\x8c\x14OrderedDict.fromkeys\x93.",
        b"(S'touch x'\nios\nsystem\n.",
        b"\x80\x02ctorch._utils\n__builtins__\n.",
        b"ctorch\nload\n.",
        b"ctorch.storage\nos\n.",
    ],
)
def test_neighbours_of_allowed_names_are_refused(data):
    with pytest.raises(InputError, match="asks for"):
        read(data)


def test_attributes_set_on_a_stand_in_reach_no_other_file():
    # BUILD with a (None, {...}) state sets attributes on whatever stands on the stack.
    poison = b"\x80\x02ctorch._utils\n_rebuild_parameter\nN}U\x0c__defaults__U\x01xs\x86b."
    with pytest.raises(InputError, match="TypeError"):
        read(poison)
    names = b"\x80\x02ctorch._utils\n_rebuild_parameter\nN}U\x07__doc__U\x01xs\x86b."
    read(names)
    assert _allowed_names()["torch._utils", "_rebuild_parameter"].__doc__ is None
    for target in (
        b"ccollections\nOrderedDict",
        b"ctorch\nSize",
        b"ctorch\nFloatStorage",
        b"ctorch\nfloat32",
    ):
        with pytest.raises(InputError):
            read(b"\x80\x02" + target + b"\nN}U\x05itemsU\x01xs\x86b.")


def test_a_dictionary_with_its_own_items_attribute():
    filled = b"ccollections\nOrderedDict\n)R(U\x01aK\x01u"
    content = read(b"\x80\x02" + filled + b"}(U\x05itemsK\x03U\x04keysK\x04U\x03getK\x05ub.")
    assert content.items == 3
    with pytest.raises(InputError, match="no dictionary of tensors; its keys: a"):
        state_dict(content, PATH)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\x80",
        b"\x80\x02",
        b"\x80\x02}",
        b"\x80\x63}.",
        b"garbage",
        b"\x80\x02r\xff\xff\xff\x7f.",
        b"\x80\x02Nr\xff\xff\xff\x7f.",
        b"\x80\x02Np2000000000\n.",
        b"\x80\x05\x96" + struct.pack("<Q", 1 << 40) + b".",
        b"\x80\x04\x8e" + struct.pack("<Q", 1 << 62) + b".",
        b"\x80\x04\x95" + struct.pack("<Q", 1 << 62) + b"N.",
        b"\x80\x02h\x05.",
        b"\x80\x02R.",
        b"\x80\x02}]s.",
        b"\x80\x02\x82\x01.",
        b"\x80\x02NQ.",
        b"P0\n.",
        b"\x80\x02(U\x07storageK\x01U\x01aU\x03cpuK\x01tQ.",
        b"\x80\x02(U\x07storagectorch\nFloatStorage\nU\x01aU\x03cpuJ\xff\xff\xff\xfftQ.",
        b"\x80\x02(U\x06modulectorch\nFloatStorage\nU\x01aU\x03cpuK\x01tQ.",
        b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n)R.",
    ],
)
def test_damaged_pickles_are_input_errors(data):
    with pytest.raises(InputError, match=r"pytorch_model\.bin"):
        read(data)


def describe(shape, stride, offset=0, size=8, name="w", storage=True):
    """A pickled state dict with one hand-made tensor description."""
    mark = b"ctorch._utils\n_rebuild_tensor_v2\n("
    holder = b"(U\x07storagectorch\nFloatStorage\nU\x010U\x03cpu" + pickle.dumps(size, 2)[2:-1] + b"tQ"
    holder = holder if storage else b"ctorch\nfloat32\n"
    parts = b"".join(pickle.dumps(part, 2)[2:-1] for part in (offset, shape, stride))
    call = mark + holder + parts + b"\x89NtR"
    return b"\x80\x02}" + pickle.dumps(name, 2)[2:-1] + call + b"s."


@pytest.mark.parametrize(
    "data",
    [
        describe((2, -2), (1, 1)),
        describe((2,), (-1,)),
        describe((2,), (1, 1)),
        describe((2, "x"), (1, 1)),
        describe((2.0,), (1,)),
        describe((2,), (1,), offset=-1),
        describe((2,), (1,), offset="1"),
        describe((2**40, 2**40, 0), (1, 1, 1)),
        describe((1,) * 40, (1,) * 40),
        describe((2,), (1,), storage=False),
    ],
)
def test_malformed_tensors_are_refused(data):
    with pytest.raises(InputError, match="tensor 'w' has a malformed description"):
        state_dict(read(data), PATH)


def test_well_formed_description():
    tensors, ignored = state_dict(read(describe((2, 3), (3, 1))), PATH)
    assert tensors["w"].shape == (2, 3)
    assert tensors["w"].is_contiguous
    assert ignored == []


@pytest.mark.parametrize("content", [[1], 3, None, "text", (), {}, {"a": 1}, {1: 2}, {"model": {"x": 3}}])
def test_no_dictionary_of_tensors(content):
    with pytest.raises(InputError, match=r"pytorch_model\.bin holds"):
        state_dict(content, PATH)


def test_nothing_of_torch_is_imported():
    code = "import sys, mindpeft.convert.writer, mindpeft.convert.loader; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
