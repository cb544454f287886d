"""An encoder whose last layer is computed for the first token alone: the same numbers, where it may be."""

from __future__ import annotations

import mindspore as ms
import numpy as np
import pytest
from mindspore import Tensor, ops

from mindpeft import BottleneckConfig, GatedLoraConfig, LoraConfig, get_peft_model
from mindpeft.models import bert, distilbert, roberta
from mindpeft.models.bert import BertConfig, BertModel
from mindpeft.models.distilbert import DistilBertConfig, DistilBertModel
from mindpeft.models.roberta import RobertaConfig
from mindpeft.nn.encoder import EncoderStack
from mindpeft.structure import structure
from tests.ops.compare import assert_close
from tests.selection import default

BATCH, LENGTH, HEADS, WIDTH = 3, 7, 4, 32
_SIZES = {"vocab_size": 40, "hidden_size": WIDTH, "num_hidden_layers": 2, "num_attention_heads": HEADS}
_BERT = BertConfig(**_SIZES, intermediate_size=48, hidden_dropout_prob=0, attention_probs_dropout_prob=0)
_ROBERTA = RobertaConfig(**_SIZES, intermediate_size=48)
_SIZES = {"vocab_size": 40, "dim": WIDTH, "n_layers": 2, "n_heads": HEADS, "hidden_dim": 48}
_DISTILBERT = DistilBertConfig(**_SIZES, dropout=0, attention_dropout=0)
MODELS = {"bert": lambda: BertModel(_BERT), "distilbert": lambda: DistilBertModel(_DISTILBERT)}
rng = np.random.default_rng(0)
IDS = rng.integers(1, 40, (BATCH, LENGTH)).astype(np.int32)
_SEEN = np.arange(LENGTH) < np.array([[LENGTH], [4], [2]])
_PAIRS = np.tril(np.ones((LENGTH, LENGTH))) + (rng.random((BATCH, LENGTH, LENGTH)) < 0.5)
MASKS = {
    "none": None,
    "of keys": _SEEN.astype(np.int32),
    "of pairs": (_PAIRS > 0).astype(np.int32),
    "of heads": (np.stack([_PAIRS] * HEADS, 1) > 0).astype(np.int32),
    "for all queries": _SEEN[:, None, None].astype(np.int32),
    "added": rng.normal(size=(BATCH, 1, LENGTH, LENGTH)).astype(np.float32),
}


def made(kind: str = "bert"):
    """A model with random parameters, larger than fresh ones, that is trained."""
    model, random = MODELS[kind](), np.random.default_rng(1)
    for parameter in model.get_parameters():
        parameter.set_data(Tensor(random.normal(0, 0.3, parameter.shape), ms.float32))
    return model.set_train()


def first_and_gradients(model, mask, first_only: bool) -> list[np.ndarray]:
    """The last hidden states of the first tokens, then all parameters' gradients of what they give."""
    mask = None if mask is None else Tensor(mask)

    def states():
        result = model(Tensor(IDS), mask, first_only=first_only)
        hidden = result[0] if isinstance(result, tuple) else result
        return ops.sin(hidden[:, 0]).sum(), hidden

    parameters = model.trainable_params()
    (_, hidden), gradients = ms.value_and_grad(states, None, parameters, has_aux=True)()
    assert hidden.shape == (BATCH, 1 if first_only else LENGTH, WIDTH)
    return [hidden[:, 0].asnumpy(), *(gradient.asnumpy() for gradient in gradients)]


@pytest.mark.parametrize("kind", default(MODELS, "bert"))
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.usefixtures("mode")
def test_the_first_token_is_the_same(kind, mask):
    model = made(kind)
    expected = first_and_gradients(model, MASKS[mask], False)
    assert_close(first_and_gradients(model, MASKS[mask], True), expected, 1e-5)


@pytest.mark.parametrize(
    ("module", "config"), [(bert, _BERT), (roberta, _ROBERTA), (distilbert, _DISTILBERT)]
)
def test_the_last_layer_of_a_classifier_shares_no_graph(module, config):
    for head, apart in (("SequenceClassification", True), ("TokenClassification", False)):
        model = module.HEADS[f"AutoModelFor{head}"](config)
        (layers,) = [cell.layer for _, cell in model.cells_and_names() if isinstance(cell, EncoderStack)]
        assert (structure(layers[0]) != structure(layers[1])) == apart


@pytest.mark.usefixtures("pynative")
def test_all_tokens_where_states_are_wanted():
    states = made()(Tensor(IDS), output_hidden_states=True)
    assert [state.shape for state in states[2]] == [(BATCH, LENGTH, WIDTH)] * 3
    assert made()(Tensor(IDS))[0].shape == (BATCH, LENGTH, WIDTH)


@pytest.mark.usefixtures("pynative")
def test_a_hook_sees_all_tokens():
    model, seen = made(), []
    assert model.encoder.can_narrow
    handle = model.encoder.layer[1].output.dense.register_forward_pre_hook(
        lambda cell, inputs: seen.append(inputs[0].shape)
    )
    model(Tensor(IDS), first_only=True)
    handle.remove()
    model(Tensor(IDS), first_only=True)
    assert seen == [(BATCH, LENGTH, 48)]
    assert model.encoder.can_narrow


@pytest.mark.parametrize(
    ("config", "narrows"),
    [
        (LoraConfig(target_modules=["query"]), True),
        (GatedLoraConfig(target_modules=["query"]), False),
        (BottleneckConfig(), True),
        (BottleneckConfig(use_gating=True), False),
    ],
)
@pytest.mark.usefixtures("pynative")
def test_gates_read_all_tokens(config, narrows):
    base = made()
    get_peft_model(base, config)
    assert base.encoder.can_narrow == narrows
    assert base(Tensor(IDS), first_only=True)[0].shape[1] == (1 if narrows else LENGTH)
