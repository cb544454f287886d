"""P-tuning against torch + peft on a small BERT."""

from __future__ import annotations

import logging

import mindspore as ms
import numpy as np
import pytest
from mindspore import Tensor

from mindpeft import PeftModel, PromptEncoderConfig, get_peft_model
from mindpeft.errors import InputError
from tests.tuners import prompts
from tests.tuners.prompts import (
    base_here,
    batch_for,
    check_reading,
    check_resuming,
    check_switching,
    check_writing,
    gradients_here,
    labels_for,
    largest_error,
    outputs_here,
)

pytestmark = pytest.mark.usefixtures("graph_mode")

METHOD = prompts.Method("PromptEncoderConfig", {"num_virtual_tokens": 4})
MLP = {"encoder_hidden_size": 20}
LSTM = {"encoder_reparameterization_type": "LSTM", "encoder_hidden_size": 10}
DEEP = {**LSTM, "encoder_num_layers": 3}


@pytest.mark.slow
@pytest.mark.parametrize(("head", "options"), [("sequence", {}), ("token", LSTM)])
def test_reading_what_peft_wrote(tmp_path, head, options):
    check_reading(METHOD, head, tmp_path, **options)


@pytest.mark.parametrize(("head", "options"), [("sequence", MLP), ("token", LSTM), ("masked", DEEP)])
def test_loss_and_gradients(tmp_path, head, options):
    prompts.check_loss_and_gradients(METHOD, head, tmp_path, **options)


def test_pynative_gives_the_same(tmp_path):
    ms.set_context(mode=ms.PYNATIVE_MODE)
    check_reading(METHOD, "sequence", tmp_path)
    check_writing(METHOD, "token", tmp_path / "more", **LSTM)


@pytest.mark.slow
@pytest.mark.parametrize("options", [{}, LSTM])
def test_writing_for_peft(tmp_path, options):
    check_writing(METHOD, "sequence", tmp_path, **options)


def test_switching():
    check_switching(METHOD, num_virtual_tokens=7, **LSTM)


@pytest.mark.slow
def test_resuming(tmp_path):
    check_resuming(METHOD, tmp_path, **LSTM)


@pytest.mark.parametrize("options", [{}, DEEP])
def test_initial_values_are_distributed_as_pefts(options):
    ms.set_seed(0)
    options = {"num_virtual_tokens": 30, **options}
    ours = get_peft_model(base_here("masked"), METHOD.config_here("masked", **options))
    expected = prompts.trained_there(METHOD.there("masked", noise=0.0, **options))
    assert {parameter.name for parameter in ours.trainable_params()} == expected.keys()
    for parameter in ours.trainable_params():
        mine, other = parameter.asnumpy(), expected[parameter.name].detach().numpy()
        assert mine.shape == other.shape
        assert mine.std() == pytest.approx(other.std(), rel=0.3), parameter.name
        assert np.abs(mine).max() == pytest.approx(np.abs(other).max(), rel=0.4), parameter.name


def test_dropout_acts_between_the_layers_of_the_lstm_while_training():
    model, batch = METHOD.here("sequence", **LSTM, encoder_dropout=0.5), batch_for("sequence")
    plain = outputs_here(METHOD.here("sequence", **LSTM), batch)
    assert largest_error(outputs_here(model, batch), plain) == 0
    model.set_train(True)
    first, second = outputs_here(model, batch), outputs_here(model, batch)
    assert largest_error(first, plain) > 1e-3
    assert largest_error(first, second) > 1e-3


def test_what_an_mlp_ignores_is_said(caplog):
    with caplog.at_level(logging.WARNING, "mindpeft"):
        METHOD.here("sequence", encoder_num_layers=4, encoder_dropout=0.1)
    assert "encoder_num_layers has no effect on an encoder of the type MLP" in caplog.text
    assert "encoder_dropout has no effect on an encoder of the type MLP" in caplog.text


def test_training_goes_on_from_the_output(tmp_path):
    METHOD.here("sequence", **LSTM).save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(base_here("sequence"), tmp_path, is_trainable=True).set_train(False)
    names = {parameter.name for parameter in again.trainable_params()}
    assert names == {"prompt_embeddings", "classifier.weight", "classifier.bias"}
    batch = batch_for("sequence")
    labels = labels_for("sequence", batch)
    before, gradients = gradients_here(again, batch, labels)
    for parameter in again.trainable_params():
        parameter.set_data(Tensor(parameter.asnumpy() - 0.1 * gradients[parameter.name]))
    assert gradients_here(again, batch, labels)[0] < before


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_virtual_tokens": 1.5}, "num_virtual_tokens must be a positive integer, not 1.5"),
        (
            {"encoder_reparameterization_type": "LTSM"},
            "one of MLP, LSTM, not 'LTSM'; did you mean 'LSTM'",
        ),
        ({"encoder_hidden_size": "wide"}, "encoder_hidden_size must be a positive integer, not 'wide'"),
        ({"encoder_num_layers": 0}, "encoder_num_layers must be a positive integer, not 0"),
        ({"encoder_dropout": 1}, r"encoder_dropout must lie in \[0, 1\), not 1"),
        ({"token_dim": 24}, "token_dim is 24, but the base model's is 48"),
        ({"num_transformer_submodules": 2}, "P_TUNING is for models of one stack"),
        ({"modules_to_save": [1]}, "modules_to_save must be a list of names"),
    ],
)
def test_mistakes_in_the_config(options, message):
    base = base_here("sequence")
    with pytest.raises(InputError, match=message):
        get_peft_model(base, PromptEncoderConfig(**{"num_virtual_tokens": 4, **options}))
    assert all(parameter.requires_grad for parameter in base.get_parameters())
