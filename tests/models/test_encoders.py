"""RoBERTa, XLM-R and DistilBERT against transformers: every head, loss, padding, files."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file

from mindpeft import models
from mindpeft.errors import InputError
from tests.models.reference import HEADS, absolute_error, run_ours, run_theirs

SIZES = {
    "vocab_size": 61,
    "hidden_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 56,
    "max_position_embeddings": 26,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
}
DISTILLED = {
    "vocab_size": 61,
    "dim": 48,
    "n_layers": 2,
    "n_heads": 4,
    "hidden_dim": 56,
    "max_position_embeddings": 24,
    "dropout": 0.0,
    "attention_dropout": 0.0,
    "seq_classif_dropout": 0.0,
    "qa_dropout": 0.0,
}
KINDS = {
    "roberta": {**SIZES, "type_vocab_size": 1},
    "xlm-roberta": {**SIZES, "type_vocab_size": 1},
    "distilbert": DISTILLED,
}
CASES = [(kind, head) for kind in KINDS for head in HEADS if not (kind == "xlm-roberta" and head == "answer")]


def make_encoder(kind: str, head: str, folder) -> transformers.PreTrainedModel:
    torch.manual_seed(0)
    options = {} if head in ("answer", "features") else {"num_labels": 4}
    config = transformers.AutoConfig.for_model(kind, **KINDS[kind], **options)
    model = getattr(transformers, HEADS[head]).from_config(config, attn_implementation="eager")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    model.save_pretrained(folder)
    return model.eval()


def make_inputs(pad: int, length: int = 19) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    ids = rng.integers(3, 61, (3, length)).astype(np.int32)
    mask = (np.arange(length) < np.array([[length], [length - 4], [5]])).astype(np.int32)
    return {"input_ids": np.where(mask, ids, pad).astype(np.int32), "attention_mask": mask}


def labels_for(head: str, mask: np.ndarray) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(1)
    if head == "sequence":
        return {"labels": rng.integers(0, 4, len(mask)).astype(np.int32)}
    if head in ("token", "masked"):
        classes = 4 if head == "token" else 61
        return {"labels": np.where(mask, rng.integers(0, classes, mask.shape), -100).astype(np.int32)}
    return {}


@pytest.mark.usefixtures("pynative")
@pytest.mark.parametrize(("kind", "head"), CASES)
def test_outputs_losses_and_files(tmp_path, kind, head):
    theirs = make_encoder(kind, head, tmp_path / "theirs")
    ours = getattr(models, HEADS[head]).from_pretrained(tmp_path / "theirs")
    assert not ours.load_report.unused
    assert not ours.load_report.newly_initialised
    batch = make_inputs(theirs.config.pad_token_id)
    labels = labels_for(head, batch["attention_mask"])
    expected = run_theirs(theirs, **batch, **labels)
    found = run_ours(ours, **batch, **labels)
    if labels:
        loss, found = found
        assert absolute_error(loss, expected.loss) <= 1e-5
    if head == "answer":
        wanted = torch.stack((expected.start_logits, expected.end_logits), -1)
    else:
        wanted = expected.last_hidden_state if head == "features" else expected.logits
    found = found[0] if isinstance(found, tuple) else found
    assert absolute_error(found, wanted) <= 1e-5 * max(1.0, float(wanted.detach().abs().max()))

    ours.save_pretrained(tmp_path / "ours")
    written = load_file(tmp_path / "ours" / "model.safetensors")
    saved = load_file(tmp_path / "theirs" / "model.safetensors")
    assert all(torch.equal(written[key], value) for key, value in saved.items())
    again = getattr(transformers, HEADS[head]).from_pretrained(tmp_path / "ours", attn_implementation="eager")
    assert torch.equal(run_theirs(again.eval(), **batch)[0], run_theirs(theirs, **batch)[0])


@pytest.mark.usefixtures("graph_mode")
@pytest.mark.parametrize("kind", KINDS)
def test_compiled(tmp_path, kind):
    theirs = make_encoder(kind, "sequence", tmp_path)
    ours = models.AutoModelForSequenceClassification.from_pretrained(tmp_path)
    batch = make_inputs(theirs.config.pad_token_id)
    assert absolute_error(run_ours(ours, **batch), run_theirs(theirs, **batch).logits) <= 1e-5


@pytest.mark.usefixtures("pynative")
def test_positions_of_roberta(tmp_path):
    """They count tokens that are no padding, wherever it stands; texts may be as long as there are places."""
    theirs = make_encoder("roberta", "features", tmp_path)
    ours = models.AutoModel.from_pretrained(tmp_path)
    batch = make_inputs(theirs.config.pad_token_id)
    left = {key: value[:, ::-1].copy() for key, value in batch.items()}
    real = left["attention_mask"] == 1
    expected = run_theirs(theirs, **left).last_hidden_state.detach().numpy()
    assert np.abs(run_ours(ours, **left)[0].asnumpy()[real] - expected[real]).max() <= 1e-4
    with pytest.raises(InputError, match=r"25 .* 24"):
        run_ours(ours, input_ids=np.full((1, 25), 5, np.int32))
