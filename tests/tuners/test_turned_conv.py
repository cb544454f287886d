"""HRA and BOFT on convolutions against torch + peft on a small net with equal weights."""

from __future__ import annotations

import mindspore as ms
import numpy as np
import peft
import pytest
import torch
from mindspore import Tensor, nn

from mindpeft import BOFTConfig, HRAConfig, LoraConfig, PeftModel, get_peft_model
from mindpeft.errors import InputError
from mindpeft.parameters import base_places
from tests.tuners.against_peft import check_files, randomise
from tests.tuners.test_lora_conv import answer, answer_of_torch, check_gradients, make_net

pytestmark = pytest.mark.usefixtures("graph_mode")

OPTIONS = {
    "HRA": ("HRAConfig", {"target_modules": ["square", "point", "head"], "r": 4, "bias": "hra_only"}),
    "HRA, orthogonal": ("HRAConfig", {"target_modules": ["square", "point"], "r": 3, "apply_GS": True}),
    "BOFT": (
        "BOFTConfig",
        {"target_modules": ["square", "point"], "boft_block_size": 6, "bias": "boft_only"},
    ),
    "BOFT, by number": (
        "BOFTConfig",
        {"target_modules": ["square"], "boft_block_size": 0, "boft_block_num": 4},
    ),
}


class TorchSquare(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.square = torch.nn.Conv2d(4, 6, 3, stride=2, padding=1)
        self.point = torch.nn.Conv2d(6, 5, 1, bias=False)
        self.head = torch.nn.Linear(5, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(torch.tanh(self.point(torch.tanh(self.square(x)))).mean((2, 3)))


class Square(nn.Cell):
    def __init__(self) -> None:
        super().__init__()
        self.square = nn.Conv2d(4, 6, 3, 2, "pad", 1, has_bias=True)
        self.point = nn.Conv2d(6, 5, 1, pad_mode="valid")
        self.head = nn.Dense(5, 3)

    def construct(self, x: Tensor, labels: Tensor | None = None):
        logits = self.head(ms.ops.tanh(self.point(ms.ops.tanh(self.square(x)))).mean((2, 3)))
        return logits if labels is None else (ms.ops.cross_entropy(logits, labels), logits)


def make_torch_square():
    torch.manual_seed(0)
    return TorchSquare().eval()


def make_square():
    net, state = Square(), make_torch_square().state_dict()
    for name, place in base_places(net).items():
        place.write(state[name].numpy())
    return net


@pytest.mark.parametrize("name", OPTIONS)
def test_reading(tmp_path, name):
    torch.manual_seed(2)
    method, options = OPTIONS[name]
    config = getattr(peft, method)(init_weights=False, **options)
    theirs = peft.PeftModel(make_torch_square(), config).eval()
    theirs.save_pretrained(tmp_path / "theirs")
    ours = PeftModel.from_pretrained(make_square(), tmp_path / "theirs", is_trainable=True)
    expected = answer_of_torch(theirs.get_base_model())
    assert np.abs(expected - answer_of_torch(make_torch_square())).max() > 0.01
    np.testing.assert_allclose(answer(ours), expected, atol=1e-5)
    assert ours.get_nb_trainable_parameters() == theirs.get_nb_trainable_parameters()
    check_gradients(ours, theirs)
    ours.save_pretrained(tmp_path / "ours")
    check_files(tmp_path / "ours", tmp_path / "theirs")
    with ours.disable_adapter():
        np.testing.assert_array_equal(answer(ours), answer(make_square()))
    ours.merge_adapter()
    np.testing.assert_allclose(answer(ours), expected, atol=1e-5)
    ours.unmerge_adapter()
    ms.set_context(mode=ms.PYNATIVE_MODE)
    np.testing.assert_allclose(answer(ours), expected, atol=1e-5)


def test_several_at_once_are_what_their_merge_is():
    """HRA and BOFT, with LoRA between them, all on one convolution."""
    ms.set_context(mode=ms.PYNATIVE_MODE)
    ms.set_seed(0)
    options = {"target_modules": ["square"], "init_weights": False}
    model = get_peft_model(make_square(), HRAConfig(r=2, **options), "one")
    model.add_adapter("lora", LoraConfig(target_modules=["square"]))
    model.add_adapter("two", BOFTConfig(boft_block_size=6, **options))
    model.set_adapter("lora")
    randomise(model)
    model.set_adapter(["one", "two"])
    both = answer(model)
    model.merge_adapter()
    np.testing.assert_allclose(answer(model), both, atol=1e-5)
    model.unmerge_adapter()
    model.set_adapter("lora")
    alone = answer(model)
    model.merge_adapter()
    np.testing.assert_allclose(answer(model), alone, atol=1e-5)


@pytest.mark.parametrize("config", [HRAConfig, BOFTConfig])
@pytest.mark.parametrize("name", ["wide", "grouped", "line"])
def test_other_convolutions_are_refused(name, config):
    message = "can't wrap .*(must have a square kernel, one stride|supported: linear cells .* and nn.Conv2d)"
    with pytest.raises(InputError, match=message):
        get_peft_model(make_net(), config(target_modules=[name]))
