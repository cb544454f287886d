"""Methods that scale or turn, active together with LoRA in either order: the sum is not the order's own."""

from __future__ import annotations

import mindspore as ms
import numpy as np
import pytest
from mindspore import Tensor, nn

import mindpeft.tuners
from mindpeft import LoraConfig, get_peft_model
from tests.tuners.against_peft import randomise

# Random initial values, or values that get noise.
CONFIGS = {
    "IA3Config": {"feedforward_modules": [], "init_ia3_weights": False},
    "OFTConfig": {"oft_block_size": 4, "init_weights": False},
    "BOFTConfig": {"init_weights": False},
    "HRAConfig": {"r": 3, "init_weights": False},
    "MissConfig": {"r": 4, "init_weights": "bat"},
    "RoadConfig": {"group_size": 4, "init_weights": False},
}


@pytest.mark.parametrize("name", CONFIGS)
def test_either_order_is_what_merging_in_that_order_gives(name):
    ms.set_context(mode=ms.GRAPH_MODE)
    ms.set_seed(1)
    cell = nn.SequentialCell(nn.Dense(8, 8, bias_init="normal"))
    model = get_peft_model(cell, LoraConfig(target_modules=["0"], r=2, init_lora_weights=False), "lora")
    config = getattr(mindpeft.tuners, name)
    model.add_adapter("other", config(target_modules=["0"], **CONFIGS[name]))
    model.set_adapter("other")
    randomise(model)
    x = Tensor(np.random.default_rng(0).normal(size=(3, 8)).astype(np.float32))
    found = []
    for order in (["lora", "other"], ["other", "lora"], ["lora", "other"]):
        model.set_adapter(order)
        found.append(model(x).asnumpy())
        model.merge_adapter()
        np.testing.assert_allclose(model(x).asnumpy(), found[-1], atol=1e-5, err_msg=str(order))
        model.unmerge_adapter()
    np.testing.assert_array_equal(found[0], found[2])
    if name != "MissConfig":  # Bat looks at the original weight alone
        assert np.abs(found[0] - found[1]).max() > 1e-3
