"""Ways to break an adapter's folder, each a function of the folder, and what must come of it."""

from __future__ import annotations

import io
import json
import os
import pickle
import struct

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file

from mindpeft.errors import InputError
from mindpeft.parameters import base_places

CONFIG = "adapter_config.json"
PEFT, HUB, MLX = "adapter_model.safetensors", "adapter.safetensors", "adapters.safetensors"
NAN, HUGE = float("nan"), 10**400


def keys(**changes):
    """Values in the config; those of names a__b go into the object a."""

    def change(folder):
        config = json.loads((folder / CONFIG).read_text())
        for name, value in changes.items():
            *outer, key = name.split("__")
            place = config
            for part in outer:
                place = place[part]
            place[key] = value
        (folder / CONFIG).write_text(json.dumps(config))

    return change


def without(*names):
    def change(folder):
        config = json.loads((folder / CONFIG).read_text())
        (folder / CONFIG).write_text(json.dumps({k: v for k, v in config.items() if k not in names}))

    return change


def weights_of(folder):
    return next(folder / name for name in (PEFT, HUB, MLX) if (folder / name).exists())


def tensors(edit):
    """``edit`` changes the dictionary of tensors."""

    def change(folder):
        path = weights_of(folder)
        content = load_file(path)
        edit(content)
        save_file(content, path, metadata={"format": "pt"})

    return change


def put(name, value):
    return tensors(lambda content: content.update({name: np.ascontiguousarray(value)}))


def drop(name):
    return tensors(lambda content: content.pop(name))


def cast(dtype):
    return tensors(lambda c: c.update({name: value.astype(dtype) for name, value in c.items()}))


def replaced(name, make):
    """``make`` gives a tensor's new value from its old one."""
    return tensors(lambda content: content.update({name: np.ascontiguousarray(make(content[name]))}))


def rename(old, new):
    return tensors(lambda c: c.update({n.replace(old, new): c.pop(n) for n in list(c)}))


def raw(data, name=CONFIG):
    def change(folder):
        (folder / name if name else weights_of(folder)).write_bytes(data)

    return change


def header(entry):
    text = json.dumps({"x": entry}).encode()
    return raw(struct.pack("<Q", len(text)) + text, None)


def cut(folder):
    path = weights_of(folder)
    path.write_bytes(path.read_bytes()[:-7])


def as_folder(name):
    def change(folder):
        (folder / name).unlink()
        (folder / name).mkdir()

    return change


def as_bin(make, name="adapter_model.bin"):
    def change(folder):
        weights_of(folder).unlink()
        (folder / name).write_bytes(make())

    return change


class Attack:
    """Unpickled by the standard library, it would leave a file behind."""

    def __reduce__(self):
        return os.system, ("touch malicious-pickle-ran",)


def attack():
    return pickle.dumps({"x": Attack()}, protocol=2)


def zipped_attack():
    buffer = io.BytesIO()
    torch.save({"x": Attack()}, buffer)
    return buffer.getvalue()


def half_a_zip():
    buffer = io.BytesIO()
    torch.save({"x": torch.zeros(99)}, buffer)
    return buffer.getvalue()[:-300]


# What every format with a config and safetensors can suffer from.
FILES = {
    "json_broken": (raw(b"{"), "adapter_config.json is not valid JSON: .* at line 1"),
    "json_empty": (raw(b""), "adapter_config.json is not valid JSON"),
    "json_binary": (raw(b"\xff\xfe\x00"), "can't read .*adapter_config.json: 'utf-8'"),
    "json_deep": (raw(b"[" * 10**6), "can't read .*adapter_config.json: .*recursion"),
    "json_folder": (as_folder(CONFIG), r"(can't read .*adapter_config.json|holds no adapter_config.json)"),
    "cut": (cut, "is truncated: tensor .* ends at byte"),
    "empty": (raw(b"", None), "has 0 bytes, too few for a header"),
    "noise": (raw(b"\x99" * 64, None), "its header would have .* bytes, more than the 100000000 allowed"),
    "long_header": (raw(struct.pack("<Q", 10**7) + b"{}", None), "can't hold its header of 10000000 bytes"),
    "header_json": (raw(struct.pack("<Q", 2) + b"{x", None), "corrupt safetensors header"),
    "huge_shape": (header({"dtype": "F32", "shape": [2**40, 2**40], "data_offsets": [0, 0]}), "has shape"),
    "huge_tensor": (
        header({"dtype": "F32", "shape": [2**30], "data_offsets": [0, 2**32]}),
        "'x' ends at byte 4294967296",
    ),
    "negative_shape": (header({"dtype": "F32", "shape": [-1], "data_offsets": [0, 0]}), r"has shape \[-1\]"),
    "dtype": (header({"dtype": "C64", "shape": [0], "data_offsets": [0, 0]}), "dtype 'C64'; allowed: F64"),
    "whole_numbers": (cast(np.int32), "has dtype I32; an adapter's are BF16, F16, F32, F64"),
    "booleans": (cast(np.bool_), "has dtype BOOL; an adapter's are BF16"),
}


def watched(model):
    return model, {name: place.read() for name, place in base_places(model).items()}, trained(model)


def trained(model):
    return [(name, p.requires_grad) for name, p in model.parameters_and_names()]


def assert_untouched(model, values, flags):
    assert trained(model) == flags
    places = base_places(model)
    assert places.keys() == values.keys()
    for name, value in values.items():
        np.testing.assert_array_equal(places[name].read(), value, err_msg=name)


def assert_refused(message, action):
    with pytest.raises(InputError, match=message) as caught:
        action()
    text = str(caught.value)
    assert "\n" not in text
    assert not os.path.exists("malicious-pickle-ran")
