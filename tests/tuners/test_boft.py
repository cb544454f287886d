"""BOFT against torch + peft on twin models."""

from __future__ import annotations

import mindspore as ms
import numpy as np
import pytest
from mindspore import Tensor, nn

from mindpeft import LoraConfig, get_peft_model
from mindpeft.errors import InputError
from mindpeft.tuners.boft import BOFTConfig
from tests.tuners import against_peft as check

pytestmark = pytest.mark.usefixtures("graph_mode")

BOFT = check.Method("BOFTConfig", {"init_weights": False})
OPTIONS = {
    "default_targets": {},
    "by_number": {
        "target_modules": ["dense", "intermediate"],
        "boft_block_size": 0,
        "boft_block_num": 2,
        "task_type": "SEQ_CLS",
    },
    "one_block": {"target_modules": ["key"], "boft_block_size": 16, "bias": "boft_only"},
    "bias_all": {"target_modules": ["query", "value"], "bias": "all"},
    "layers": {
        "target_modules": ["dense"],
        "layers_to_transform": 1,
        "exclude_modules": ["attention.output.dense"],
    },
}


@check.each_option(OPTIONS)
def test_reads_what_peft_wrote(mode, twins, tmp_path, name):
    check.check_reading(twins, tmp_path, BOFT, **OPTIONS[name])


def test_peft_reads_what_we_wrote(twins, tmp_path):
    check.check_writing(twins, tmp_path, BOFT, **OPTIONS["by_number"])


@pytest.mark.parametrize("name", ["by_number", "one_block"])
def test_pynative_gives_the_same(twins, tmp_path, name):
    check.check_pynative(twins, tmp_path, BOFT, **OPTIONS[name])


@pytest.mark.parametrize("init", [True, False])
def test_initial_values(twins, init):
    check.check_initial_values(twins, BOFT, init_weights=init)


def test_switching(twins):
    check.check_switching(twins, BOFT, OPTIONS["default_targets"], OPTIONS["one_block"], OPTIONS["by_number"])


def test_dropout_leaves_a_share_of_the_blocks_alone():
    ms.set_seed(2)
    cell = nn.SequentialCell(nn.Dense(32, 32, has_bias=False))
    cell[0].weight.set_data(Tensor(np.eye(32, dtype=np.float32)))
    model = get_peft_model(cell, BOFTConfig(target_modules=["0"], init_weights=False, boft_dropout=0.5))
    x = Tensor(np.random.default_rng(0).normal(size=(6, 32)).astype(np.float32))
    factors = model.base_model[0].boft_s.asnumpy()[:, 0]
    whole, seen = model(x).asnumpy(), set()
    model.set_train(True)
    for _ in range(6):
        y = model(x).asnumpy()
        turned = np.array(
            [not np.allclose(part, 0, atol=1e-6) for part in np.split(y / factors - x.asnumpy(), 8, 1)]
        )
        assert turned.sum() == 4
        seen.add(tuple(turned))
        kept = np.repeat(turned, 4)
        np.testing.assert_allclose(y, np.where(kept, whole, x.asnumpy() * factors), atol=1e-6)
    assert len(seen) > 1


def test_on_top_of_lora():
    """The original cell's bias is found through another layer."""
    ms.set_seed(2)
    cell = nn.SequentialCell(nn.Dense(8, 8, bias_init="normal"))
    model = get_peft_model(cell, LoraConfig(target_modules=["0"], r=2, init_lora_weights=False), "lora")
    model.add_adapter("boft", BOFTConfig(target_modules=["0"], init_weights=False))
    x = Tensor(np.random.default_rng(0).normal(size=(3, 8)).astype(np.float32))
    model.set_adapter("boft")
    alone = model(x).asnumpy()
    model.merge_adapter()
    np.testing.assert_allclose(model(x).asnumpy(), alone, atol=1e-5)


def test_half_precision_base_keeps_a_float32_adapter():
    check.check_half_precision(BOFTConfig(target_modules=["0"], init_weights=False))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"boft_block_num": 4}, "exactly one of boft_block_size and boft_block_num must be 0, not 4 and 4"),
        ({"boft_block_size": 0}, "exactly one of boft_block_size and boft_block_num must be 0, not 0 and 0"),
        ({"boft_block_size": 5}, "boft_block_size=5 does not divide the width of .*query', which is 16"),
        ({"boft_block_size": 0, "boft_block_num": 3}, "boft_block_num=3 does not divide the width of"),
        ({"boft_block_size": 2.0}, "boft_block_size must be an integer, 0 or more, not 2.0"),
        ({"boft_n_butterfly_factor": 2}, "boft_n_butterfly_factor=2 is not supported; only 1 is"),
        ({"boft_dropout": 1.5}, r"boft_dropout must lie in \[0, 1\), not 1.5"),
        (
            {"bias": "oft_only"},
            "bias must be one of none, all, boft_only, not 'oft_only'; did you mean 'boft_only'",
        ),
        ({"target_modules": ["c_attn"]}, "BOFT can't wrap the cell 'c_attn' of class Conv1D"),
    ],
)
def test_mistakes(twins, options, message):
    with pytest.raises(InputError, match=message):
        get_peft_model(twins.make_model(), BOFTConfig(**options))
