"""LoHa and LoKr on convolutions against torch + peft."""

from __future__ import annotations

import mindspore as ms
import numpy as np
import peft.tuners.loha.layer
import pytest
import torch
from mindspore import Tensor, nn, ops

from mindpeft import LoHaConfig, LoKrConfig, get_peft_model
from mindpeft.errors import InputError
from mindpeft.parameters import base_places
from tests.tuners import against_peft as check

pytestmark = pytest.mark.usefixtures("graph_mode")

IDS = np.random.default_rng(1).normal(size=(4, 4, 9, 8)).astype(np.float32)  # images, in fact


class TorchImages(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.first = torch.nn.Conv2d(4, 8, 3, padding=1)
        self.second = torch.nn.Conv2d(8, 12, (3, 2), stride=2, dilation=(1, 2), groups=2, bias=False)
        self.point = torch.nn.Conv2d(12, 6, 1)
        self.head = torch.nn.Linear(6, 3)

    def forward(self, x, **_):
        x = torch.relu(self.second(torch.relu(self.first(x))))
        return self.head(self.point(x).mean((2, 3)))


class Images(nn.Cell):
    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(4, 8, 3, pad_mode="pad", padding=1, has_bias=True)
        self.second = nn.Conv2d(8, 12, (3, 2), stride=2, dilation=(1, 2), group=2, pad_mode="valid")
        self.point = nn.Conv2d(12, 6, 1, has_bias=True)
        self.head = nn.Dense(6, 3)

    def construct(self, x, labels=None):
        x = ops.relu(self.second(ops.relu(self.first(x))))
        logits = self.head(self.point(x).mean((2, 3)))
        return logits if labels is None else (ops.cross_entropy(logits, labels), logits)


class twins:
    """Stands in for the module of that name."""

    IDS = IDS

    @staticmethod
    def make_model():
        model, random = Images(), np.random.default_rng(2)
        for place in base_places(model).values():
            place.write(random.normal(0, 0.3, place.parameter.shape).astype(np.float32))
        return model

    @staticmethod
    def make_torch():
        model = TorchImages()
        places = base_places(twins.make_model()).items()
        model.load_state_dict({name: torch.tensor(place.read()) for name, place in places})
        return model.eval()

    @staticmethod
    def logits(model):
        return model(Tensor(IDS)).asnumpy()

    @staticmethod
    def torch_logits(model):
        bare = model.get_base_model() if hasattr(model, "get_base_model") else model
        return bare(torch.tensor(IDS)).detach().numpy()


METHODS = {name: check.Method(name, {"init_weights": False}) for name in ("LoHaConfig", "LoKrConfig")}
ALL = {"target_modules": ["first", "second", "point"]}
OPTIONS = {
    "loha_flat": ("LoHaConfig", {**ALL, "r": 2, "alpha": 1}),
    "loha_effective": ("LoHaConfig", {**ALL, "r": 2, "alpha": 1, "use_effective_conv2d": True}),
    "lokr_whole": ("LoKrConfig", {**ALL, "r": 8}),
    "lokr_flat": ("LoKrConfig", {**ALL, "r": 1, "alpha": 1, "decompose_both": True}),
    "lokr_effective": ("LoKrConfig", {**ALL, "r": 1, "alpha": 1, "use_effective_conv2d": True}),
}


def true_product(t1, a1, b1, t2, a2, b2, scale):
    first, second = (torch.einsum("ijkl,jr,ip->prkl", t, b, a) for t, b, a in ((t1, b1, a1), (t2, b2, a2)))
    return first * second * scale


@pytest.mark.parametrize("name", OPTIONS)
def test_reads_what_peft_wrote(tmp_path, monkeypatch, name):
    # PEFT's own backward pass of this product takes the wrong one of two intermediate results: the gradients
    # of hada_w1_a and hada_w2_a are not those of its forward pass. Ours are compared with torch's autograd.
    monkeypatch.setattr(peft.tuners.loha.layer, "make_weight_cp", true_product)
    method, options = OPTIONS[name]
    check.check_reading(twins, tmp_path, METHODS[method], **options)


@pytest.mark.parametrize("name", ["loha_effective", "lokr_effective"])
def test_peft_reads_what_we_wrote(tmp_path, name):
    method, options = OPTIONS[name]
    check.check_writing(twins, tmp_path, METHODS[method], **options)


@pytest.mark.parametrize("name", ["loha_effective", "lokr_effective"])
def test_pynative_gives_the_same(tmp_path, name):
    method, options = OPTIONS[name]
    check.check_pynative(twins, tmp_path, METHODS[method], **options)


@pytest.mark.parametrize("init", [True, False])
@pytest.mark.parametrize("name", ["loha_effective", "lokr_flat"])
def test_initial_values(name, init):
    method, options = OPTIONS[name]
    check.check_initial_values(twins, METHODS[method], **{**options, "r": 6, "init_weights": init})


def test_switching():
    check.check_switching(
        twins, METHODS["LoHaConfig"], *(OPTIONS[name][1] for name in ("loha_flat", "loha_effective"))
    )


@pytest.mark.parametrize("config", [LoHaConfig, LoKrConfig])
def test_rank_dropout_zeroes_channels_of_the_update(config):
    ms.set_seed(4)
    options = {"target_modules": ["0"], "init_weights": False, "rank_dropout": 0.4}
    cell = nn.SequentialCell(nn.Conv2d(4, 8, 3))
    model = get_peft_model(cell, config(**options))
    with model.disable_adapter():
        plain = model(Tensor(IDS)).asnumpy()
    whole = model(Tensor(IDS)).asnumpy() - plain
    model.set_train(True)
    seen = set()
    for _ in range(8):
        update = model(Tensor(IDS)).asnumpy() - plain
        kept = np.abs(update).max((0, 2, 3)) > 1e-6
        factor = 1 / kept.mean() if config is LoHaConfig else 1
        np.testing.assert_allclose(update, whole * kept[:, None, None] * factor, atol=2e-5)
        seen.add(tuple(kept))
    assert len(seen) > 2


@pytest.mark.parametrize("config", [LoHaConfig, LoKrConfig])
def test_other_convolutions_are_refused(config):
    cell = nn.SequentialCell(nn.Conv3d(2, 2, 3))
    with pytest.raises(InputError, match="can't wrap the cell '0' of class Conv3d"):
        get_peft_model(cell, config(target_modules=["0"]))
