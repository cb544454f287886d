"""BERT against transformers: hidden states, heads, losses, inputs of every kind, gradients."""

from __future__ import annotations

import mindspore as ms
import numpy as np
import pytest
import torch
import transformers
from mindspore import Tensor

from mindpeft.errors import InputError
from mindpeft.models import AutoModel, AutoModelForSequenceClassification
from tests.models import reference
from tests.models.reference import make_batch, make_reference, open_ours, run_ours, run_theirs

TEXTS = [
    "wait until a socket is ready for reading",
    "Compress a file.",
    "Return the natural logarithm of one plus x, in a way that is accurate for x near zero.",
]


@pytest.fixture(scope="module")
def minilm_batch(minilm_dir) -> dict[str, np.ndarray]:
    tokenizer = transformers.AutoTokenizer.from_pretrained(minilm_dir)
    return {
        key: value.astype(np.int32)
        for key, value in tokenizer(TEXTS, padding=True, return_tensors="np").items()
    }


def test_minilm_hidden_states_and_pooled_output(minilm_dir, minilm_batch, mode):
    ours = AutoModel.from_pretrained(minilm_dir)
    theirs = transformers.AutoModel.from_pretrained(minilm_dir, attn_implementation="eager").eval()
    last, pooled, states = run_ours(ours, **minilm_batch, output_hidden_states=True)
    expected = run_theirs(theirs, **minilm_batch, output_hidden_states=True)
    assert len(states) == len(expected.hidden_states) == 7
    # Relative to the largest value, which is about 10: there float32 itself resolves 1e-6 only, and torch's
    # own float32 run is 2.5e-5 away from its float64 run.
    for found, wanted in zip(states, expected.hidden_states, strict=True):
        assert reference.relative_error(found, wanted) <= 1e-5
    assert reference.relative_error(last, expected.last_hidden_state) <= 1e-5
    assert reference.absolute_error(pooled, expected.pooler_output) <= 1e-5


def test_minilm_logits(minilm_dir, minilm_batch, tmp_path, mode):
    torch.manual_seed(0)
    theirs = transformers.AutoModelForSequenceClassification.from_pretrained(
        minilm_dir, num_labels=5, attn_implementation="eager"
    ).eval()
    theirs.save_pretrained(tmp_path)
    ours = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    found, expected = run_ours(ours, **minilm_batch), run_theirs(theirs, **minilm_batch).logits
    assert reference.absolute_error(found, expected) <= 1e-5


# Every head and loss: the head, its configuration, and labels from a random generator for (batch, length).
HEAD_CASES = {
    "single_label": ("sequence", {"num_labels": 4}, lambda rng, b, n: rng.integers(0, 4, b)),
    "multi_label": (
        "sequence",
        {"num_labels": 4, "problem_type": "multi_label_classification"},
        lambda rng, b, n: rng.integers(0, 2, (b, 4)).astype(np.float32),
    ),
    "regression": ("sequence", {"num_labels": 1}, lambda rng, b, n: rng.normal(size=b)),
    "regression_of_three": (
        "sequence",
        {"num_labels": 3, "problem_type": "regression"},
        lambda rng, b, n: rng.normal(size=(b, 3)),
    ),
    "token": ("token", {"num_labels": 5}, lambda rng, b, n: some_ignored(rng, rng.integers(0, 5, (b, n)))),
    # the last answer lies outside the text and counts for nothing
    "answer": ("answer", {}, lambda rng, b, n: np.array([*rng.integers(0, n, (b - 1, 2)), [n, n + 3]])),
    "masked": ("masked", {}, lambda rng, b, n: some_ignored(rng, rng.integers(0, 61, (b, n)))),
    "masked_untied": (
        "masked",
        {"tie_word_embeddings": False},
        lambda rng, b, n: some_ignored(rng, rng.integers(0, 61, (b, n))),
    ),
}


def some_ignored(rng, labels):
    return np.where(rng.random(labels.shape) < 0.4, -100, labels)


def make_labels(draw, batch=3, length=11):
    labels = draw(np.random.default_rng(3), batch, length)
    return labels.astype(np.float32 if labels.dtype.kind == "f" else np.int32)


def theirs_with_labels(model, head, batch, labels):
    """(loss, logits) of transformers; the two logits of an answer in one tensor, as ours are."""
    if head != "answer":
        out = run_theirs(model, **batch, labels=labels)
        return out.loss, out.logits
    out = run_theirs(model, **batch, start_positions=labels[:, 0], end_positions=labels[:, 1])
    return out.loss, torch.stack((out.start_logits, out.end_logits), -1)


IN_GRAPH_BY_DEFAULT = ("single_label", "answer", "masked")  # a graph takes some seconds to compile
CASES_AND_MODES = [
    *((case, "pynative") for case in HEAD_CASES),
    *(
        pytest.param(case, "graph", marks=() if case in IN_GRAPH_BY_DEFAULT else pytest.mark.slow)
        for case in HEAD_CASES
    ),
]


@pytest.mark.parametrize(("case", "mode"), CASES_AND_MODES, indirect=["mode"])
def test_logits_losses_and_all_gradients(tmp_path, case, mode):
    head, config, draw = HEAD_CASES[case]
    theirs, batch, labels = make_reference(head, tmp_path, **config), make_batch(), make_labels(draw)
    ours = open_ours(head, tmp_path)

    expected_loss, expected_logits = theirs_with_labels(theirs, head, batch, labels)
    expected_loss.backward()
    expected = {name: value.grad for name, value in theirs.named_parameters()}

    parameters = dict(ours.parameters_and_names())
    assert parameters.keys() == expected.keys()
    (loss, logits), gradients = loss_and_gradients(ours, parameters.values(), batch, labels)
    assert reference.absolute_error(loss, expected_loss) <= 1e-5 * max(1, float(expected_loss.detach()))
    assert reference.absolute_error(logits, expected_logits) <= 1e-5
    largest = max(value.abs().max() for value in expected.values() if value is not None)
    for name, gradient in zip(parameters, gradients, strict=True):
        wanted = expected[name]
        if wanted is None or wanted.abs().max() <= 1e-6 * largest:
            # The loss does not depend on it (adding one vector to all keys changes no softmax, say): the
            # exact gradient is zero, and what either side finds is rounding.
            assert np.abs(gradient.asnumpy()).max() <= 1e-5 * largest, name
        else:
            assert reference.relative_error(gradient, wanted) <= 1e-4, name


def loss_and_gradients(model, parameters, batch, labels):
    """((loss, logits), gradients) of our model, in one graph."""

    def forward(input_ids, attention_mask, token_type_ids, labels):
        return model(input_ids, attention_mask, token_type_ids, None, labels)

    function = ms.value_and_grad(forward, None, ms.ParameterTuple(parameters), has_aux=True)
    return function(*(Tensor(value) for value in (*batch.values(), labels)))


def random_mask(*shape):
    """0 and 1, with at least one 1 in every row."""
    mask = (np.random.default_rng(4).random(shape) < 0.6).astype(np.int32)
    mask[..., 0] = 1
    return mask


def additive(mask):
    """What transformers takes for a mask of four axes: 0 where visible, the lowest number where not."""
    return np.where(mask.astype(bool), 0.0, np.finfo(np.float32).min).astype(np.float32)


PADDING = make_batch()["attention_mask"]
PAIRS = random_mask(3, 11, 11)
HEADS = random_mask(3, 4, 11, 11)

# Our mask, and the one that means the same to transformers.
MASKS = {
    "int32": (PADDING, PADDING),
    "int64": (PADDING.astype(np.int64), PADDING),
    "bool": (PADDING.astype(bool), PADDING),
    "float": (PADDING.astype(np.float32), PADDING),
    "pairs": (PAIRS, additive(PAIRS[:, None])),
    "pairs_bool": (PAIRS.astype(bool), additive(PAIRS[:, None])),
    "pairs_float": (PAIRS.astype(np.float32), additive(PAIRS[:, None])),
    "four_axes": (PADDING[:, None, None], PADDING),
    "four_axes_bool": (PAIRS[:, None].astype(bool), additive(PAIRS[:, None])),
    "of_each_head": (HEADS, additive(HEADS)),
    "additive": (additive(PAIRS[:, None]), additive(PAIRS[:, None])),
    "additive_of_each_head": (additive(HEADS) * 1e-38, additive(HEADS) * 1e-38),
    "additive_row": (additive(PADDING[:, None, None]), additive(PADDING[:, None, None])),
}


@pytest.fixture(scope="module")
def features(tmp_path_factory):
    """(ours, theirs): one bare BERT for the tests of inputs."""
    folder = tmp_path_factory.mktemp("features")
    theirs = make_reference("features", folder)
    return open_ours("features", folder), theirs


def assert_same_features(features, inputs: dict, their_inputs: dict):
    ours, theirs = features
    last, pooled = run_ours(ours, **inputs)
    expected = run_theirs(theirs, **their_inputs)
    assert reference.absolute_error(last, expected.last_hidden_state) <= 1e-5
    assert reference.absolute_error(pooled, expected.pooler_output) <= 1e-5


@pytest.mark.parametrize("name", MASKS)
def test_masks(features, name):
    ours, theirs = MASKS[name]
    batch = make_batch()
    assert_same_features(features, {**batch, "attention_mask": ours}, {**batch, "attention_mask": theirs})


@pytest.mark.parametrize("name", ["pairs_bool", "additive_of_each_head"])
def test_masks_in_a_graph(features, name):
    ms.set_context(mode=ms.GRAPH_MODE)
    test_masks(features, name)


def test_a_row_without_any_visible_token_attends_evenly(features):
    batch = make_batch()
    batch["attention_mask"][1] = 0
    assert_same_features(features, batch, batch)


def inputs_of_all_kinds():
    batch, rng = make_batch(), np.random.default_rng(6)
    ids, length = batch["input_ids"], batch["input_ids"].shape[1]
    return {
        "ids_alone": {"input_ids": ids},
        "no_token_types": {"input_ids": ids, "attention_mask": PADDING},
        "token_types_alone": {"input_ids": ids, "token_type_ids": batch["token_type_ids"]},
        "positions": {**batch, "position_ids": rng.integers(0, 24, ids.shape).astype(np.int32)},
        "int64": {name: value.astype(np.int64) for name, value in batch.items()},
        "one_token": make_batch(length=1),
        "one_text": make_batch(batch=1, length=7),
        "odd_length": make_batch(batch=2, length=23),
        "greatest_length": make_batch(batch=2, length=24, padded=False),
        "embeddings": {
            "input_ids": None,
            "attention_mask": PADDING,
            "inputs_embeds": rng.normal(size=(3, length, 48)).astype(np.float32),
        },
    }


@pytest.mark.parametrize("name", inputs_of_all_kinds())
def test_inputs(features, name):
    inputs = inputs_of_all_kinds()[name]
    assert_same_features(features, inputs, inputs)


@pytest.mark.parametrize(
    "name",
    [
        "ids_alone",
        "embeddings",
        *(pytest.param(n, marks=pytest.mark.slow) for n in ("positions", "one_token")),
    ],
)
def test_inputs_in_a_graph(features, name):
    ms.set_context(mode=ms.GRAPH_MODE)
    test_inputs(features, name)


@pytest.mark.parametrize(
    "name",
    [
        "gelu",
        "gelu_new",
        "gelu_fast",
        "gelu_pytorch_tanh",
        "quick_gelu",
        "relu",
        "silu",
        "swish",
        "tanh",
        "sigmoid",
    ],
)
def test_activations(tmp_path, name):
    theirs = make_reference("masked", tmp_path, hidden_act=name, num_hidden_layers=1)
    batch = make_batch()
    found = run_ours(open_ours("masked", tmp_path), **batch)
    assert reference.absolute_error(found, run_theirs(theirs, **batch).logits) <= 1e-5


@pytest.mark.parametrize("width", [32, 64])
@pytest.mark.parametrize("head", reference.HEADS)
def test_other_widths(tmp_path, head, width):
    theirs = make_reference(head, tmp_path, seed=width, hidden_size=width, intermediate_size=2 * width + 3)
    batch = make_batch(batch=2, length=9, seed=width)
    found, expected = run_ours(open_ours(head, tmp_path), **batch), run_theirs(theirs, **batch)
    logits = {
        "features": lambda: (found[0], expected.last_hidden_state),
        "answer": lambda: (found[..., 0], expected.start_logits),
    }.get(head, lambda: (found, expected.logits))()
    assert reference.absolute_error(*logits) <= 1e-5


def test_nothing_counted_gives_no_loss(tmp_path):
    make_reference("masked", tmp_path)
    batch = make_batch()
    loss, _ = run_ours(open_ours("masked", tmp_path), **batch, labels=np.full((3, 11), -100, np.int32))
    assert float(loss) == 0


def test_rows_left_out_do_not_count(tmp_path):
    make_reference("sequence", tmp_path, num_labels=1)
    ours, batch = open_ours("sequence", tmp_path), make_batch()
    labels = np.array([1.0, -2.0, 0.5], np.float32)
    kept = np.array([1, 0, 1], np.float32)
    loss, logits = run_ours(ours, **batch, labels=labels, example_mask=kept)
    wanted = np.mean((logits.asnumpy()[[0, 2], 0] - labels[[0, 2]]) ** 2)
    assert float(loss) == pytest.approx(wanted, rel=1e-5)


def test_dropout_acts_while_training_only(tmp_path):
    make_reference("sequence", tmp_path, hidden_dropout_prob=0.3, attention_probs_dropout_prob=0.3)
    ours, batch = open_ours("sequence", tmp_path), make_batch()
    np.testing.assert_array_equal(run_ours(ours, **batch).asnumpy(), run_ours(ours, **batch).asnumpy())
    ours.set_train(True)
    assert (run_ours(ours, **batch).asnumpy() != run_ours(ours, **batch).asnumpy()).any()


def test_a_text_longer_than_the_positions_is_refused(features, mode):
    ours, _ = features
    with pytest.raises(InputError, match="25 tokens, but max_position_embeddings is 24"):
        run_ours(ours, **make_batch(length=25))
