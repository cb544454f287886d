"""Loading into a Cell: names, reports, refusals and peak memory."""

import gc
import subprocess
import sys
from pathlib import Path

import mindspore as ms
import numpy as np
import pytest
from mindspore import Parameter, Tensor, nn
from mindspore.common.initializer import initializer
from mindspore.nn.utils import no_init_parameters

from mindpeft.convert.checkpoint import Checkpoint, open_checkpoint
from mindpeft.convert.loader import hf_renamer, load_weights, parameter_places
from mindpeft.convert.safetensors_file import write_safetensors
from mindpeft.convert.tensors import RawTensor
from mindpeft.errors import InputError


class Leaf(nn.Cell):
    def __init__(self, dtype=ms.float32, **shapes):
        super().__init__()
        for name, shape in shapes.items():
            setattr(self, name, Parameter(Tensor(np.zeros(shape), dtype), name=name))


class Bare(nn.Cell):
    def __init__(self, dtype=ms.float32):
        super().__init__()
        self.embeddings = Leaf(dtype, weight=(6, 4))
        self.LayerNorm = Leaf(dtype, weight=(4,), bias=(4,))


class Headed(nn.Cell):
    def __init__(self, dtype=ms.float32, labels=3):
        super().__init__()
        self.bert = Bare(dtype)
        self.classifier = Leaf(dtype, weight=(labels, 4), bias=(labels,))


class Tied(nn.Cell):
    def __init__(self):
        super().__init__()
        self.bert = Bare()
        self.decoder = Leaf(bias=(6,))
        self.decoder.weight = self.bert.embeddings.weight


RNG = np.random.default_rng(0)
BACKBONE = {
    "embeddings.weight": RNG.normal(size=(6, 4)).astype(np.float32),
    "LayerNorm.weight": RNG.normal(size=4).astype(np.float32),
    "LayerNorm.bias": RNG.normal(size=4).astype(np.float32),
}
HEAD = {
    "classifier.weight": RNG.normal(size=(3, 4)).astype(np.float32),
    "classifier.bias": RNG.normal(size=3).astype(np.float32),
}
PREFIXED = {f"bert.{name}": value for name, value in BACKBONE.items()}
OLD = {
    name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): value
    for name, value in PREFIXED.items()
}


@pytest.fixture
def checkpoint(tmp_path):
    def make(arrays, dtype=None):
        path = tmp_path / "model.safetensors"
        tensors = {name: RawTensor.from_numpy(array) for name, array in arrays.items()}
        write_safetensors(path, ((n, raw.astype(dtype) if dtype else raw) for n, raw in tensors.items()))
        return open_checkpoint(path)

    return make


def load(cell, opened, **options):
    return load_weights(cell, opened, rename=hf_renamer(parameter_places(cell), "bert"), **options)


def values(cell):
    return {name: parameter.asnumpy().copy() for name, parameter in parameter_places(cell).items()}


@pytest.mark.parametrize("file", [BACKBONE, PREFIXED, OLD])
@pytest.mark.parametrize("cell_type", [Bare, Headed])
def test_prefix_and_old_names(file, cell_type, checkpoint):
    cell = cell_type()
    report = load(cell, checkpoint(file))
    got = {name.removeprefix("bert."): value for name, value in values(cell).items()}
    for name, value in BACKBONE.items():
        np.testing.assert_array_equal(got[name], value)
    assert len(report.loaded) == 3
    assert report.unused == []
    assert report.newly_initialised == (list(HEAD) if cell_type is Headed else [])


def test_headed_file_into_a_bare_model(checkpoint):
    report = load(Bare(), checkpoint({**PREFIXED, **HEAD}))
    assert len(report.loaded) == 3
    assert sorted(report.unused) == sorted(HEAD)


def test_identity_without_a_renamer(checkpoint):
    cell = Headed()
    report = load_weights(cell, checkpoint({**PREFIXED, **HEAD}))
    assert sorted(report.loaded) == sorted({**PREFIXED, **HEAD})
    for name, value in {**PREFIXED, **HEAD}.items():
        np.testing.assert_array_equal(values(cell)[name], value)


def test_a_models_own_gamma_is_not_renamed():
    rename = hf_renamer(["norm.gamma", "norm.weight", "other.weight"])
    assert rename("norm.gamma") == "norm.gamma"
    assert rename("other.gamma") == "other.weight"
    assert rename("nowhere.gamma") == "nowhere.gamma"


def test_renamer_may_leave_out(checkpoint):
    report = load_weights(Bare(), checkpoint(BACKBONE), rename=lambda name: None if "bias" in name else name)
    assert (len(report.loaded), report.unused, report.newly_initialised) == (2, [], ["LayerNorm.bias"])


def test_ignored_buffers_are_silent(checkpoint):
    file = {**BACKBONE, "embeddings.position_ids": np.arange(5)[None], "junk": np.ones(2, np.float32)}
    report = load(Bare(), checkpoint(file), ignore_unexpected=[r"position_ids$"])
    assert report.unused == ["junk"]


def test_misshapen_is_refused_before_anything_changes(checkpoint):
    cell = Headed(labels=7)
    before = values(cell)
    message = (
        r"doesn't fit the model: classifier.bias is \(3,\) in the file and \(7,\) in the model; "
        r"classifier.weight is \(3, 4\) in the file and \(7, 4\) in the model$"
    )
    with pytest.raises(InputError, match=message):
        load(cell, checkpoint({**PREFIXED, **HEAD}))
    for name, value in values(cell).items():
        np.testing.assert_array_equal(value, before[name])


def test_mismatched_sizes_may_be_ignored(checkpoint):
    cell = Headed(labels=7)
    report = load(cell, checkpoint({**PREFIXED, **HEAD}), ignore_mismatched_sizes=True)
    assert sorted(report.misshapen) == sorted(HEAD)
    assert report.newly_initialised == []
    assert len(report.loaded) == 3
    assert not values(cell)["classifier.weight"].any()
    assert "another shape" in str(report)


def test_two_tensors_for_one_parameter(checkpoint):
    with pytest.raises(
        InputError,
        match=r"tensors 'LayerNorm.bias' and 'bert.LayerNorm.bias' both stand for the parameter 'LayerN",
    ):
        load(Bare(), checkpoint({**BACKBONE, **PREFIXED}))


@pytest.mark.parametrize("name", ["bert.embeddings.weight", "decoder.weight"])
def test_tied_weights_under_either_name(name, checkpoint):
    cell = Tied()
    report = load(cell, checkpoint({name: BACKBONE["embeddings.weight"]}))
    np.testing.assert_array_equal(cell.decoder.weight.asnumpy(), BACKBONE["embeddings.weight"])
    assert cell.decoder.weight is cell.bert.embeddings.weight
    assert report.loaded == [name]
    assert sorted(report.newly_initialised) == [
        "bert.LayerNorm.bias",
        "bert.LayerNorm.weight",
        "decoder.bias",
    ]


def test_tied_weights_under_both_names(checkpoint):
    weight = BACKBONE["embeddings.weight"]
    report = load(Tied(), checkpoint({"bert.embeddings.weight": weight, "decoder.weight": weight}))
    assert sorted(report.loaded) == ["bert.embeddings.weight", "decoder.weight"]
    assert report.unused == []


@pytest.mark.parametrize("held", ["F64", "F32", "F16", "BF16"])
@pytest.mark.parametrize("own", [ms.float32, ms.float16, ms.bfloat16])
def test_parameters_keep_their_dtype(held, own, checkpoint):
    cell = Bare(own)
    load(cell, checkpoint(BACKBONE, held))
    for name, parameter in parameter_places(cell).items():
        assert parameter.dtype == own
        expected = RawTensor.from_numpy(BACKBONE[name]).astype(held).astype(own)
        assert RawTensor.from_parameter(parameter).data.tobytes() == expected.data.tobytes()


def test_dtype_for_the_whole_cell(checkpoint):
    cell = Headed()
    load(cell, checkpoint(PREFIXED), dtype="bfloat16")
    assert {parameter.dtype for parameter in parameter_places(cell).values()} == {ms.bfloat16}
    got = RawTensor.from_parameter(cell.bert.LayerNorm.bias)
    expected = RawTensor.from_numpy(BACKBONE["LayerNorm.bias"]).astype("BF16")
    assert got.data.tobytes() == expected.data.tobytes()


def test_floats_for_an_integer_parameter_are_refused(checkpoint):
    with pytest.raises(InputError, match=r"bias' is F32, but the model's parameter is I32"):
        load(Bare(ms.int32), checkpoint(BACKBONE))


def test_loading_again_changes_a_compiled_graph(checkpoint):
    class Net(nn.Cell):
        def __init__(self):
            super().__init__()
            self.weight = Parameter(Tensor(np.zeros(4, np.float32)), name="weight")

        def construct(self, x):
            return x * self.weight

    net = Net()
    compiled = ms.jit(net.construct)
    x = Tensor(np.ones(4, np.float32))
    for value in (1.0, 2.0, 3.0):
        load_weights(net, checkpoint({"weight": np.full(4, value, np.float32)}))
        assert compiled(x).asnumpy().tolist() == [value] * 4


@pytest.mark.parametrize(
    "dtype", [ms.float32, ms.bfloat16, ms.float64, ms.int64, ms.int8, ms.uint16, ms.bool_]
)
@pytest.mark.parametrize("shape", [(), (3,), (2, 3), (0, 4)])
def test_every_dtype_and_shape_is_filled(dtype, shape, checkpoint):
    raw = RawTensor.from_numpy(np.ones(shape)).astype(dtype)
    cell = Leaf(dtype, weight=shape)
    load_weights(cell, checkpoint({"weight": raw.numpy()}, None if raw.dtype != "BF16" else "BF16"))
    assert RawTensor.from_parameter(cell.weight).data.tobytes() == raw.data.tobytes()


@pytest.fixture
def mapped(monkeypatch):
    """The names of the tensors that are mapped."""
    names = []
    original = Checkpoint.mapped

    def note(self, name):
        names.append(name)
        return original(self, name)

    monkeypatch.setattr(Checkpoint, "mapped", note)
    return names


@pytest.mark.parametrize("held", ["F32", "BF16"])
@pytest.mark.parametrize("own", [ms.float32, ms.bfloat16])
def test_read_by_rows(held, own, checkpoint, mapped):
    cell = Bare()
    with checkpoint(BACKBONE, held) as opened:
        load(cell, opened, dtype=own, by_rows={"embeddings.weight"})
    assert mapped == (["embeddings.weight"] if (held == "F32") == (own == ms.float32) else [])
    del opened
    gc.collect()
    for name, parameter in parameter_places(cell).items():
        expected = RawTensor.from_numpy(BACKBONE[name]).astype(held).astype(own)
        assert RawTensor.from_parameter(parameter).data.tobytes() == expected.data.tobytes()


def test_read_by_rows_but_not_on_an_accelerator(checkpoint, mapped, monkeypatch):
    monkeypatch.setattr("mindpeft.convert.loader.on_cpu", lambda: False)
    load(Bare(), checkpoint(BACKBONE), by_rows={"embeddings.weight"})
    assert mapped == []


def test_parameters_created_without_memory(checkpoint):
    with no_init_parameters():
        cell = nn.Cell()
        cell.weight = Parameter(initializer("normal", (2, 3), ms.float32), name="weight")
    assert cell.weight.has_init
    load_weights(cell, checkpoint({"weight": np.ones((2, 3), np.float32)}))
    assert cell.weight.asnumpy().tolist() == [[1.0] * 3] * 2


def test_report_is_short(checkpoint):
    many = {f"extra.{i}": np.ones(1, np.float32) for i in range(20)}
    report = load(Headed(), checkpoint({**PREFIXED, **many}))
    lines = str(report).splitlines()
    assert lines[0].startswith("loaded 3 tensors from model.safetensors in ")
    assert lines[1] == "2 newly initialised (not in the checkpoint): classifier.weight, classifier.bias"
    assert lines[2].startswith("20 unused (not in the model): extra.0")
    assert lines[2].endswith("and 12 more")


def test_an_error_shows_the_first_misfits(checkpoint):
    cell = Leaf(**{f"w{i}": (2,) for i in range(8)})
    with pytest.raises(InputError, match=r"and 3 more$"):
        load_weights(cell, checkpoint({f"w{i}": np.ones(3, np.float32) for i in range(8)}))


def test_damaged_file_during_the_load(checkpoint, tmp_path):
    cell = Leaf(weight=(1 << 20,))
    opened = checkpoint({"weight": np.ones(1 << 20, np.float32)})
    with open(tmp_path / "model.safetensors", "r+b") as file:
        file.truncate(1 << 20)
    with pytest.raises(InputError, match="truncated"):
        load_weights(cell, opened)


MEMORY_SCRIPT = """
import sys
import mindspore as ms
from mindspore import Parameter, nn
from mindspore.common.initializer import initializer
from mindpeft.convert.checkpoint import open_checkpoint
from mindpeft.convert.loader import load_weights

def status(field):
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith(field))

class Model(nn.Cell):
    def __init__(self, dtype):
        super().__init__()
        self.words = Parameter(initializer("zeros", (60000, 1024), dtype), name="words")
        for i in range(20):
            setattr(self, f"dense{i}", Parameter(initializer("zeros", (4096, 1024), dtype), name=f"d{i}"))

before = status("VmRSS")
cell = Model(getattr(ms, sys.argv[2]))
with open("/proc/self/clear_refs", "w") as file:
    file.write("5")
with open_checkpoint(sys.argv[1]) as checkpoint:
    report = load_weights(cell, checkpoint)
assert len(report.loaded) == 21, report
assert float(cell.words[3, 5]) == 0.5 and float(cell.dense19[7, 7]) == 0.5
print(status("VmHWM") - before)
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="peak memory is read from /proc")
@pytest.mark.parametrize(
    ("kind", "held", "own"),
    [
        ("safetensors", "float32", "float32"),
        pytest.param("bin", "float32", "float32", marks=pytest.mark.slow),
        pytest.param("safetensors", "bfloat16", "float32", marks=pytest.mark.slow),
        ("bin", "float32", "bfloat16"),
    ],
)
def test_peak_memory(kind, held, own, tmp_path):
    import safetensors.torch
    import torch

    tensors = {"words": torch.full((60000, 1024), 0.5, dtype=getattr(torch, held))}
    tensors |= {f"dense{i}": torch.full((4096, 1024), 0.5, dtype=getattr(torch, held)) for i in range(20)}
    path = tmp_path / f"model.{kind}"
    (safetensors.torch.save_file if kind == "safetensors" else torch.save)(tensors, path)
    unit = 4 if own == "float32" else 2
    elements = sum(tensor.numel() for tensor in tensors.values())
    limit = (elements + tensors["words"].numel()) * unit + 300 * 2**20
    del tensors
    run = subprocess.run(
        [sys.executable, "-c", MEMORY_SCRIPT, str(path), own], capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr
    peak = int(run.stdout)
    assert elements * unit < peak < limit
