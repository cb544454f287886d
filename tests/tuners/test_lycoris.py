"""Dropout of rows and of whole layers, in LoHa and LoKr."""

from __future__ import annotations

import mindspore as ms
import numpy as np
import pytest
from mindspore import Tensor, nn

from mindpeft import LoHaConfig, LoKrConfig, get_peft_model

X = np.random.default_rng(0).normal(size=(5, 64)).astype(np.float32)


def updates(config, calls):
    """The whole update of one linear cell, and what training makes of it at each call."""
    ms.set_context(mode=ms.GRAPH_MODE)
    ms.set_seed(5)
    model = get_peft_model(nn.SequentialCell(nn.Dense(64, 64)), config)
    with model.disable_adapter():
        plain = model(Tensor(X)).asnumpy()
    whole = model(Tensor(X)).asnumpy() - plain
    model.set_train(True)
    return whole, [model(Tensor(X)).asnumpy() - plain for _ in range(calls)]


CONFIGS = {
    "loha": (LoHaConfig, {}, True),
    "lokr": (LoKrConfig, {}, False),
    "lokr_scaled": (LoKrConfig, {"rank_dropout_scale": True}, True),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_rank_dropout_zeroes_rows_of_the_delta(name):
    kind, options, scales = CONFIGS[name]
    config = kind(target_modules=["0"], r=4, init_weights=False, rank_dropout=0.25, **options)
    whole, seen = updates(config, 20)
    shares = []
    for update in seen:
        kept = np.abs(update).max(0) > 1e-6
        shares.append(kept.mean())
        factor = 1 / kept.mean() if scales else 1
        np.testing.assert_allclose(update, whole * kept * factor, atol=1e-5)
    assert np.mean(shares) == pytest.approx(0.75, abs=0.06)
    assert len(set(shares)) > 3


@pytest.mark.parametrize("name", ["loha", "lokr"])
def test_module_dropout_drops_the_whole_layer(name):
    kind, options, _ = CONFIGS[name]
    config = kind(target_modules=["0"], r=4, init_weights=False, module_dropout=0.3, **options)
    whole, seen = updates(config, 60)
    kept = np.array([np.abs(update).max() > 1e-6 for update in seen])
    for update, stays in zip(seen, kept, strict=True):
        np.testing.assert_allclose(update, whole * stays, atol=1e-6)
    assert kept.mean() == pytest.approx(0.7, abs=0.2)
    assert 0 < kept.sum() < 60


def test_adapters_without_dropout_take_it_away_again():
    ms.set_context(mode=ms.GRAPH_MODE)
    model = get_peft_model(
        nn.SequentialCell(nn.Dense(64, 64)),
        LoHaConfig(target_modules=["0"], init_weights=False, rank_dropout=0.5),
    )
    model.add_adapter("plain", LoHaConfig(target_modules=["0"], init_weights=False))
    model.set_adapter("plain")
    model.set_train(True)
    np.testing.assert_array_equal(model(Tensor(X)).asnumpy(), model(Tensor(X)).asnumpy())
