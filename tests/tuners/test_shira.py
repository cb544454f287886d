"""SHiRA against torch + peft on twin models."""

from __future__ import annotations

import mindspore as ms
import numpy as np
import pytest
from mindspore import Tensor, nn
from safetensors.numpy import load_file, save_file

from mindpeft import PeftModel, get_peft_model
from mindpeft.errors import InputError
from mindpeft.tuners.shira import ShiraConfig
from tests.tuners import against_peft as check

pytestmark = pytest.mark.usefixtures("graph_mode")

SHIRA = check.Method("ShiraConfig", {"r": 2}, noise=0.3)
OPTIONS = {
    "default_targets": {"random_seed": 4},
    "widths_differ": {"target_modules": ["intermediate", "dense"], "r": 3, "task_type": "SEQ_CLS"},
}


@check.each_option(OPTIONS)
def test_reads_what_peft_wrote(mode, twins, tmp_path, name):
    check.check_reading(twins, tmp_path, SHIRA, **OPTIONS[name])


def test_peft_reads_what_we_wrote(twins, tmp_path):
    check.check_writing(twins, tmp_path, SHIRA, **OPTIONS["widths_differ"])


def test_pynative_gives_the_same(twins, tmp_path):
    check.check_pynative(twins, tmp_path, SHIRA, **OPTIONS["widths_differ"])


def test_initial_values(twins):
    check.check_initial_values(twins, SHIRA)
    check.check_initial_values(twins, SHIRA, init_weights=False)


def test_switching(twins):
    check.check_switching(twins, SHIRA, OPTIONS["default_targets"], OPTIONS["widths_differ"], {"r": 3})


def test_a_seed_gives_pefts_places(twins, tmp_path):
    SHIRA.in_peft(twins, tmp_path / "theirs", random_seed=9)
    SHIRA.here(twins, random_seed=9).save_pretrained(tmp_path / "ours")
    ours, theirs = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("ours", "theirs"))
    names = [name for name in theirs if name.endswith("shira_indices")]
    assert len(names) == 2 * twins.LAYERS
    for name in names:
        np.testing.assert_array_equal(ours[name], theirs[name])
        assert ours[name].dtype == theirs[name].dtype == np.int32


def test_places_without_a_seed_are_drawn(twins):
    drawn = []
    for seed in (0, 0, 1):
        ms.set_seed(seed)
        model = get_peft_model(twins.make_model(), ShiraConfig(r=2, target_modules=["query"]))
        drawn.append({p.name: p.asnumpy() for p in model.get_parameters() if "shira_indices" in p.name})
        for rows, columns in drawn[-1].values():
            assert len(set(zip(rows, columns, strict=True))) == 4 * twins.WIDTH
    name = next(iter(drawn[0]))
    np.testing.assert_array_equal(drawn[0][name], drawn[1][name])
    assert (drawn[0][name] != drawn[2][name]).any()


def test_half_precision_slots_keep_their_places():
    cell = nn.SequentialCell(nn.Dense(2100, 4, dtype=ms.float16))
    config = ShiraConfig(target_modules=["0"], init_weights=False, r=1)
    model = get_peft_model(cell, config, autocast_adapter_dtype=False)
    x = Tensor(np.random.default_rng(0).normal(size=(3, 2100)).astype(np.float16))
    y = model(x)
    assert y.dtype == ms.float16
    model.merge_adapter()
    np.testing.assert_allclose(y.asnumpy(), model(x).asnumpy(), atol=0.2)


@pytest.mark.parametrize(("row", "value"), [(0, 16), (1, -1), (0, None)])
def test_places_outside_the_weight_or_twice_are_refused(twins, tmp_path, row, value):
    SHIRA.in_peft(twins, tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    tensors = load_file(path)
    places = next(tensors[name] for name in tensors if name.endswith("shira_indices"))
    if value is None:
        places[:, 0] = places[:, 1]
    else:
        places[row, 3] = value
    save_file(tensors, path)
    with pytest.raises(
        InputError, match=r"rows and columns of its weight, which is \(16, 16\), each place once"
    ):
        PeftModel.from_pretrained(twins.make_model(), tmp_path)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"r": 0}, "r must be a positive integer, not 0"),
        (
            {"r": 9},
            "r=9 is more than 'encoder.layer.0.attention.self.query' has places for; it may be up to 8",
        ),
        ({"random_seed": -1}, "random_seed must be an integer, 0 or more"),
        ({"mask_type": "mine"}, "mask_type must be \"random\", not 'mine'"),
        ({"target_modules": ["c_attn"]}, "SHiRA can't wrap the cell 'c_attn' of class Conv1D"),
    ],
)
def test_mistakes(twins, options, message):
    with pytest.raises(InputError, match=message):
        get_peft_model(twins.make_model(), ShiraConfig(**options))
