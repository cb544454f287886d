"""(IA)3 on convolutions against torch + peft on a small net with equal weights."""

from __future__ import annotations

import mindspore as ms
import numpy as np
import peft
import pytest
import torch
from mindspore import Tensor, nn

from mindpeft import PeftModel, get_peft_model
from mindpeft.errors import InputError
from mindpeft.tuners.ia3 import IA3Config
from tests.tuners.against_peft import check_files
from tests.tuners.test_lora_conv import answer, answer_of_torch, check_gradients, make_net, make_torch

pytestmark = pytest.mark.usefixtures("graph_mode")

TARGETS = {"target_modules": ["wide", "grouped", "point", "head"]}
OPTIONS = {
    "outputs": {**TARGETS, "feedforward_modules": []},
    "inputs": {**TARGETS, "feedforward_modules": ["wide", "grouped"]},
}


@pytest.mark.parametrize("name", OPTIONS)
def test_reading(tmp_path, name):
    torch.manual_seed(2)
    theirs = peft.PeftModel(make_torch(), peft.IA3Config(init_ia3_weights=False, **OPTIONS[name])).eval()
    theirs.save_pretrained(tmp_path / "theirs")
    ours = PeftModel.from_pretrained(make_net(), tmp_path / "theirs", is_trainable=True)
    expected = answer_of_torch(theirs.get_base_model())
    np.testing.assert_allclose(answer(ours), expected, atol=1e-5)
    assert ours.get_nb_trainable_parameters() == theirs.get_nb_trainable_parameters()
    check_gradients(ours, theirs)
    ours.save_pretrained(tmp_path / "ours")
    check_files(tmp_path / "ours", tmp_path / "theirs")
    with ours.disable_adapter():
        np.testing.assert_array_equal(answer(ours), answer(make_net()))
    ours.merge_adapter()
    np.testing.assert_allclose(answer(ours), expected, atol=1e-5)
    ours.unmerge_adapter()
    ms.set_context(mode=ms.PYNATIVE_MODE)
    np.testing.assert_allclose(answer(ours), expected, atol=1e-5)


@pytest.mark.parametrize("on_input", [True, False])
def test_volumes(tmp_path, on_input):
    ms.set_context(mode=ms.PYNATIVE_MODE)
    bare = torch.nn.Sequential(torch.nn.Conv3d(2, 4, (1, 2, 3), groups=2))
    config = peft.IA3Config(
        init_ia3_weights=False, target_modules=["0"], feedforward_modules=["0"] if on_input else []
    )
    cell = nn.SequentialCell(nn.Conv3d(2, 4, (1, 2, 3), pad_mode="valid", group=2, has_bias=True))
    cell[0].weight.set_data(Tensor(bare[0].weight.detach().numpy()))
    cell[0].bias.set_data(Tensor(bare[0].bias.detach().numpy()))
    theirs = peft.PeftModel(bare, config)
    theirs.save_pretrained(tmp_path)
    x = np.random.default_rng(0).normal(size=(2, 2, 3, 4, 5)).astype(np.float32)
    expected = theirs.get_base_model()(torch.tensor(x)).detach().numpy()
    ours = PeftModel.from_pretrained(cell, tmp_path)
    np.testing.assert_allclose(ours(Tensor(x)).asnumpy(), expected, atol=1e-5)
    ours.merge_adapter()
    np.testing.assert_allclose(ours(Tensor(x)).asnumpy(), expected, atol=1e-5)


def test_other_convolutions_are_refused():
    config = IA3Config(target_modules=["line"], feedforward_modules=[])
    with pytest.raises(InputError, match=r"class Conv1d; supported: linear cells, nn.Conv2d and nn.Conv3d"):
        get_peft_model(make_net(), config)
