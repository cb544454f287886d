"""OFT against torch + peft on twin models."""

from __future__ import annotations

import json
import logging
import re

import mindspore as ms
import numpy as np
import pytest
from mindspore import Tensor, nn
from peft.tuners.oft.layer import OFTLayer

from mindpeft import PeftConfig, get_peft_model
from mindpeft.errors import InputError
from mindpeft.tuners.oft import OFTConfig
from tests.tuners import against_peft as check

pytestmark = pytest.mark.usefixtures("graph_mode")

OFT = check.Method("OFTConfig", {"oft_block_size": 4})
OPTIONS = {
    "default_targets": {},
    "exact_cayley": {"target_modules": ["dense", "intermediate"], "use_cayley_neumann": False},
    "three_terms": {"target_modules": ["dense"], "num_cayley_neumann_terms": 3},
    "two_terms": {
        "target_modules": ["dense"],
        "num_cayley_neumann_terms": 2,
        "exclude_modules": ["1.output.dense"],
    },
    "blocks": {
        "target_modules": ["query", "key"],
        "r": 2,
        "oft_block_size": 0,
        "num_cayley_neumann_terms": 6,
    },
    "adjusted": {"target_modules": ["dense"], "oft_block_size": 7, "bias": "oft_only"},
    "shared": {"target_modules": ["dense"], "block_share": True, "task_type": "SEQ_CLS"},
    "embeddings": {"target_modules": ["words", "kinds"], "bias": "all"},
}


@check.each_option(OPTIONS)
def test_reads_what_peft_wrote(mode, twins, tmp_path, name):
    check.check_reading(twins, tmp_path, OFT, **OPTIONS[name])


@pytest.mark.parametrize("name", ["default_targets", "shared"])
def test_peft_reads_what_we_wrote(twins, tmp_path, name):
    check.check_writing(twins, tmp_path, OFT, **OPTIONS[name])


@pytest.mark.parametrize("name", ["exact_cayley", "embeddings"])
def test_pynative_gives_the_same(twins, tmp_path, name):
    check.check_pynative(twins, tmp_path, OFT, **OPTIONS[name])


@pytest.mark.parametrize(
    ("version", "options", "message"),
    [
        (None, {}, r"5 terms ended in 2 Q^4; as in PEFT since, it ends in Q^4"),
        ("0.17.2.dev0@a1", {"num_cayley_neumann_terms": 3}, r"3 terms ended in 2 Q^2; .* ends in Q^3"),
        ("odd", {}, "from PEFT before 0.18"),
        ("0.18.0", {}, None),
        ("1.0", {}, None),
        (None, {"num_cayley_neumann_terms": 2}, None),  # the same then as now
        (None, {"use_cayley_neumann": False}, None),
    ],
)
def test_files_from_before_the_series_changed_are_warned_of(tmp_path, caplog, version, options, message):
    OFTConfig(oft_block_size=4, **options).save_pretrained(tmp_path)
    path = tmp_path / "adapter_config.json"
    values = {**json.loads(path.read_text()), "peft_version": version}
    path.write_text(json.dumps({key: value for key, value in values.items() if value is not None}))
    with caplog.at_level(logging.WARNING, "mindpeft"):
        PeftConfig.from_pretrained(tmp_path)
    assert bool(caplog.text) == bool(message)
    assert re.search((message or "").replace("^", r"\^"), caplog.text)


@pytest.mark.parametrize("init", [True, False])
def test_initial_values(twins, init):
    check.check_initial_values(twins, OFT, init_weights=init)


def test_switching(twins):
    check.check_switching(twins, OFT, OPTIONS["default_targets"], {"oft_block_size": 2}, OPTIONS["adjusted"])


def test_switching_between_parametrisations_compiles_the_right_graph(twins):
    exact, shared = {"use_cayley_neumann": False}, {"block_share": True}
    model = OFT.here(twins, seed=1)
    expected = twins.logits(model)
    model.add_adapter("exact", OFT.ours(**exact))
    model.add_adapter("shared", OFT.ours(**shared))
    for name in ("exact", "shared", "default"):
        model.set_adapter(name)
        found = twins.logits(model)
    np.testing.assert_array_equal(found, expected)


def test_many_small_blocks_are_turned_together():
    ms.set_seed(2)
    cell = nn.SequentialCell(nn.Dense(144, 5))
    model = get_peft_model(cell, OFTConfig(target_modules=["0"], oft_block_size=2, init_weights=False))
    x = Tensor(np.random.default_rng(0).normal(size=(2, 3, 144)).astype(np.float32))
    before = model(x).asnumpy()
    model.merge_adapter()
    np.testing.assert_allclose(model(x).asnumpy(), before, atol=1e-5)


def test_dropout_leaves_a_share_of_the_blocks_alone():
    ms.set_seed(2)
    options = {"target_modules": ["0"], "oft_block_size": 4, "init_weights": False}
    cell = nn.SequentialCell(nn.Dense(32, 32, has_bias=False, weight_init="zeros"))
    cell[0].weight.set_data(Tensor(np.eye(32, dtype=np.float32)))
    model = get_peft_model(cell, OFTConfig(**options, module_dropout=0.3))
    x = np.random.default_rng(0).normal(size=(6, 32)).astype(np.float32)
    whole = model(Tensor(x)).asnumpy().reshape(6, 8, 4)
    model.set_train(True)
    left_alone = set()
    for _ in range(10):
        y = model(Tensor(x)).asnumpy().reshape(6, 8, 4)
        same = [bool(np.allclose(y[:, n], x.reshape(6, 8, 4)[:, n], atol=1e-6)) for n in range(8)]
        assert sum(same) == 2  # of 0.3 * 8
        for number, is_same in enumerate(same):
            if not is_same:
                np.testing.assert_allclose(y[:, number], whole[:, number], atol=1e-6)
        left_alone.add(tuple(same))
    assert len(left_alone) > 3


@pytest.mark.parametrize("width", [2, 12, 17, 24, 100, 768])
def test_blocks_are_adjusted_as_in_peft(width):
    for wanted in (2, 3, 5, 7, 10, 32, 70, 1000):
        adjust = wanted if width % wanted == 0 else OFTLayer.adjust_oft_parameters(None, width, wanted)
        try:
            blocks, size = OFTConfig(oft_block_size=wanted).split(width, "x")
        except InputError:
            assert adjust == 1
        else:
            assert (blocks, size) == (width // adjust, adjust)


def test_half_precision_base_keeps_a_float32_adapter():
    check.check_half_precision(OFTConfig(target_modules=["0"], oft_block_size=4, init_weights=False))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"r": 8}, "exactly one of r and oft_block_size must be 0, not 8 and 32 .*before PEFT 0.14"),
        ({"r": 0, "oft_block_size": 0}, "exactly one of r and oft_block_size must be 0"),
        ({"oft_block_size": -4}, "oft_block_size must be an integer, 0 or more"),
        ({"coft": True}, "coft=True is not supported"),
        ({"num_cayley_neumann_terms": 1}, "num_cayley_neumann_terms must be an integer of 2 or more, not 1"),
        ({"module_dropout": 1}, r"module_dropout must lie in \[0, 1\)"),
        ({"eps": "x"}, "eps must be a number"),
        ({"bias": "lora_only"}, "bias must be one of none, all, oft_only"),
        ({"oft_block_size": 1}, "OFT has nothing to turn in .*blocks of one column of its 16"),
        ({"target_modules": ["c_attn"]}, "OFT can't wrap the cell 'c_attn' of class Conv1D"),
    ],
)
def test_mistakes(twins, options, message):
    with pytest.raises(InputError, match=message):
        get_peft_model(twins.make_model(), OFTConfig(**options))
