"""The trainer on a small BERT with LoRA."""

from __future__ import annotations

import mindspore as ms
import mindspore.dataset
import numpy as np
import pytest

from mindpeft import LoraConfig, PeftModel, get_peft_model
from mindpeft.errors import InputError
from mindpeft.models import AutoTokenizer
from mindpeft.models.bert import BertConfig, BertForSequenceClassification
from mindpeft.train import Trainer, TrainingArguments
from mindpeft.train.optim import AdamW, undecayed_names
from mindpeft.train.step import TrainStep
from tests.train.small import make_examples

HIDDEN, INNER, ROWS = 24, 56, 8


def make_bert(num_labels: int = 4, dropout: float = 0.0, layers: int = 2) -> BertForSequenceClassification:
    ms.set_seed(0)
    config = BertConfig(
        vocab_size=30,
        hidden_size=HIDDEN,
        num_hidden_layers=layers,
        num_attention_heads=2,
        intermediate_size=INNER,
        max_position_embeddings=32,
        hidden_dropout_prob=dropout,
        attention_probs_dropout_prob=dropout,
    )
    config.num_labels = num_labels
    return BertForSequenceClassification(config)


def make_lora(num_labels: int = 4, dropout: float = 0.0) -> PeftModel:
    config = LoraConfig(task_type="SEQ_CLS", r=2, target_modules=["query", "value"], lora_dropout=dropout)
    return get_peft_model(make_bert(num_labels, dropout), config)


def make_trainer(folder, model, train, evaluation=None, **changes) -> Trainer:
    values = {"max_steps": 6, "learning_rate": 1e-2, "logging_steps": 1, "max_buckets": 1, "progress": False}
    return Trainer(model, TrainingArguments(str(folder), **{**values, **changes}), train, evaluation)


def test_trained_adapter_is_saved_resumed_and_read_again(tmp_path):
    train = make_examples(36)
    whole = make_trainer(tmp_path / "a", make_lora(), train, save_strategy="steps", save_steps=4)
    whole.train()
    rest = make_trainer(tmp_path / "b", make_lora(), train, save_strategy="no")
    rest.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-4"))
    loss = [line["loss"] for line in whole.state.log_history]
    assert [line["loss"] for line in rest.state.log_history] == loss
    assert whole.report.trainable_parameters < whole.report.total_parameters / 10
    again = PeftModel.from_pretrained(make_bert(), tmp_path / "a")
    np.testing.assert_allclose(
        make_trainer(tmp_path / "c", again, None).predict(train).predictions,
        whole.predict(train).predictions,
        atol=1e-6,
    )


@pytest.mark.slow  # tests/parity/test_graph.py counts the products of an encoder too
@pytest.mark.usefixtures("plain_operators")
def test_graph_holds_no_gradient_of_a_frozen_weight(tmp_path):
    """A feed-forward weight's gradient is a matrix product of shape (INNER, HIDDEN) or (HIDDEN, INNER)."""

    def weight_gradients(model, folder):
        batch = [row | {"input_ids": row["input_ids"][:5]} for row in make_examples(ROWS)]
        columns = ("input_ids", "labels")
        arrays = [ms.Tensor([row[name] for row in batch], ms.int32) for name in columns]
        optimizer = AdamW(model)
        step = TrainStep(model, columns, optimizer).set_train(True)
        ms.set_context(save_graphs=2, save_graphs_path=str(folder))
        try:
            step(ms.Tensor(True), ms.Tensor(1.0, ms.float32), *optimizer.scalars(1, 1e-3), *arrays)
        finally:
            ms.set_context(save_graphs=0)
        text = max(folder.rglob("*_validate_*.ir"), key=lambda path: path.stat().st_mtime).read_text()
        lines = text.splitlines()
        shapes = [lines[i + 1].rsplit("->", 1)[-1] for i, line in enumerate(lines) if "MatMul(" in line]
        wanted = (f"({INNER}, {HIDDEN})", f"({HIDDEN}, {INNER})")
        return len(shapes), sum(any(want in shape for want in wanted) for shape in shapes)

    products, frozen = weight_gradients(make_lora(), tmp_path)
    assert products > 0
    assert frozen == 0
    assert weight_gradients(make_bert(), tmp_path)[1] == 4  # two layers, two weights each: it would be seen


def test_regression_gives_padding_rows_no_weight(tmp_path):
    rows = [{**row, "labels": float(row["labels"])} for row in make_examples(10)]
    means = []
    for size in (10, 8):
        trainer = make_trainer(tmp_path, make_lora(1), None, rows, per_device_eval_batch_size=size)
        means.append(trainer.evaluate()["eval_loss"])
    assert means[0] == pytest.approx(means[1], rel=1e-5)


def test_dropout_begins_the_same_with_the_seed_whatever_ran_before(tmp_path):
    runs = []
    for name in "ab":
        trainer = make_trainer(tmp_path / name, make_lora(dropout=0.2), make_examples(36), max_steps=12)
        trainer.train()
        runs.append([line["loss"] for line in trainer.state.log_history])
        ms.ops.dropout(ms.ops.ones((4, 4), ms.float32), 0.5)
    assert runs[0] == runs[1]


def test_mindspore_data_set_of_texts_is_tokenised(tmp_path, minilm_dir):
    tokenizer = AutoTokenizer.from_pretrained(minilm_dir)
    texts = ["wait for the socket", "compress the file", "open the archive", "accept a connection"] * 3
    labels = [0, 1, 1, 0] * 3
    texts_and_labels = mindspore.dataset.NumpySlicesDataset({"text": texts, "label": labels}, shuffle=False)
    encoded = tokenizer(texts)
    rows = [{**{k: encoded[k][i] for k in encoded}, "labels": labels[i]} for i in range(len(texts))]
    runs = []
    for name, dataset in (("texts", texts_and_labels), ("rows", rows)):
        model = BertForSequenceClassification.from_pretrained(minilm_dir, num_labels=2, num_hidden_layers=1)
        model.classifier.weight.set_data(ms.ops.zeros_like(model.classifier.weight))
        trainer = make_trainer(tmp_path / name, model, dataset, max_steps=2)
        trainer.processing_class = tokenizer
        trainer.train()
        runs.append([line["loss"] for line in trainer.state.log_history])
    assert runs[0] == runs[1]
    trainer = make_trainer(tmp_path / "none", make_lora(), texts_and_labels, max_steps=2)
    with pytest.raises(InputError, match="give the Trainer a tokenizer"):
        trainer.train()


def test_decay_spares_what_torch_users_spare():
    names = undecayed_names(make_bert())
    weights = dict(make_bert().parameters_and_names())
    assert {name for name in weights if name.endswith(".bias") or "LayerNorm" in name} == names
