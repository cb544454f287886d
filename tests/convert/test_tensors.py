"""RawTensor: dtypes, conversions with torch as the oracle, and MindSpore both ways."""

import mindspore as ms
import numpy as np
import pytest
import torch

from mindpeft.convert.tensors import (
    STORAGE,
    LazyTensor,
    RawTensor,
    TensorInfo,
    dtype_name,
    empty_bytes,
    is_shape,
)
from mindpeft.errors import InputError

TORCH = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
EDGES = [
    0.0,
    -0.0,
    1.0,
    -1.5,
    65504.0,
    65519.9,
    65520.0,
    1e-8,
    6e-8,
    3.3e38,
    3.4e38,
    -3.4e38,
    1e-40,
    np.inf,
    -np.inf,
]


def random_raw(dtype, shape=(3, 5)):
    count = int(np.prod(shape))
    rng = np.random.default_rng(0)
    data = rng.integers(0, 256, count * STORAGE[dtype].itemsize, dtype=np.uint8)
    return RawTensor(dtype, shape, data & 1 if dtype == "BOOL" else data)


def to_torch(raw):
    return torch.frombuffer(bytearray(raw.data.tobytes()), dtype=TORCH[raw.dtype]).reshape(raw.shape)


@pytest.mark.parametrize("dtype", STORAGE)
@pytest.mark.parametrize("shape", [(3, 5), (), (0, 4), (7,)])
def test_mindspore_round_trip_keeps_every_bit(dtype, shape):
    raw = random_raw(dtype, shape)
    tensor = raw.to_mindspore()
    assert tensor.shape == shape
    assert dtype_name(tensor.dtype) == dtype
    back = RawTensor.from_parameter(ms.Parameter(tensor, name="p"))
    assert (back.dtype, back.shape, back.data.tobytes()) == (dtype, shape, raw.data.tobytes())


@pytest.mark.parametrize("source", ["F64", "F32", "F16", "BF16", "I64", "U8"])
@pytest.mark.parametrize("target", ["F64", "F32", "F16", "BF16"])
def test_conversions_equal_torch(source, target):
    rng = np.random.default_rng(1)
    values = np.concatenate([EDGES, rng.normal(size=5000) * 10.0 ** rng.integers(-9, 9, 5000)])
    values = rng.integers(0, 255, 100).astype(np.float64) if source in ("I64", "U8") else values
    start = torch.from_numpy(values).to(TORCH[source])
    raw = RawTensor(source, tuple(start.shape), start.view(torch.uint8).numpy())
    expected = start.to(TORCH[target]).view(torch.uint8).numpy()
    np.testing.assert_array_equal(raw.astype(target).data, expected)


def test_bfloat16_rounds_ties_to_even_and_keeps_nan():
    bits = np.array([0x3F808000, 0x3F818000, 0x3F808001, 0x7F800001, 0xFF800001], dtype=np.uint32)
    narrowed = RawTensor.from_numpy(bits.view(np.float32)).astype("BF16")
    assert narrowed.stored()[:3].tolist() == [0x3F80, 0x3F82, 0x3F81]
    assert np.isnan(narrowed.numpy()[3:]).all()


def test_every_bfloat16_widens_exactly():
    bits = np.arange(1 << 16, dtype=np.uint16)
    widened = RawTensor("BF16", bits.shape, bits.view(np.uint8)).numpy()
    np.testing.assert_array_equal(widened.view(np.uint32) >> 16, bits)
    assert not (widened.view(np.uint32) & 0xFFFF).any()


def test_conversion_spans_several_chunks():
    values = np.random.default_rng(2).normal(size=(3_000_001,)).astype(np.float32)
    got = RawTensor.from_numpy(values).astype("BF16")
    np.testing.assert_array_equal(got.data, torch.from_numpy(values).bfloat16().view(torch.uint8).numpy())


def test_from_numpy_takes_any_layout_and_byte_order():
    array = np.arange(12, dtype=">f4").reshape(3, 4).T
    raw = RawTensor.from_numpy(array)
    assert (raw.dtype, raw.shape) == ("F32", (4, 3))
    np.testing.assert_array_equal(raw.numpy(), array)


def test_mindspore_tensor_shares_memory_on_cpu():
    raw = RawTensor("F32", (4,), empty_bytes(16))
    raw.stored()[:] = 1
    tensor = raw.to_mindspore()
    raw.stored()[0] = 7
    assert tensor.asnumpy()[0] == 7


def test_buffers_are_aligned():
    assert all(empty_bytes(n).ctypes.data % 64 == 0 for n in (1, 100, 1 << 20))


@pytest.mark.parametrize(
    ("spelling", "name"),
    [
        ("F32", "F32"),
        ("bf16", "BF16"),
        ("bfloat16", "BF16"),
        ("float16", "F16"),
        (ms.bfloat16, "BF16"),
        (ms.float32, "F32"),
        (ms.bool_, "BOOL"),
        (np.float64, "F64"),
        (np.dtype("int8"), "I8"),
    ],
)
def test_dtype_spellings(spelling, name):
    assert dtype_name(spelling) == name


def test_unknown_dtype_names_the_nearest():
    with pytest.raises(InputError, match=r"'flaot32'.*did you mean 'float32'.*allowed: F64, F32"):
        dtype_name("flaot32")


def test_dtypes_that_checkpoints_lack_are_refused():
    with pytest.raises(InputError, match="complex64"):
        RawTensor.from_numpy(np.zeros(2, np.complex64))


def test_raw_tensor_checks_its_size():
    with pytest.raises(ValueError, match="needs 8 flat bytes"):
        RawTensor("F32", (2,), np.zeros(7, np.uint8))


def test_lazy_tensor_converts_when_fetched():
    parameter = ms.Parameter(ms.Tensor(np.array([1.0, 2.5], np.float32)), name="p")
    lazy = LazyTensor.from_parameter(parameter, "F16")
    parameter.set_data(ms.Tensor(np.array([3.0, 4.5], np.float32)))
    assert (lazy.dtype, lazy.shape, lazy.nbytes) == ("F16", (2,), 4)
    assert lazy.load().numpy().tolist() == [3.0, 4.5]


@pytest.mark.parametrize("bad", [[-1], [True], [1.0], "3", [2**59], [2**40, 2**40, 0], [1] * 33, None])
def test_impossible_shapes(bad):
    assert not is_shape(bad)


def test_info_counts(tmp_path):
    info = TensorInfo("w", "BF16", (3, 4), tmp_path)
    assert (info.size, info.nbytes) == (12, 24)
