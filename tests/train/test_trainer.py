from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import mindspore as ms
import mindspore.dataset
import numpy as np
import pytest
from mindspore import Tensor

from mindpeft.errors import InputError
from mindpeft.train import NonFiniteLossError, Trainer, TrainerCallback, TrainingArguments
from mindpeft.train.checkpoints import list_checkpoints
from tests.train.small import LABELS, SmallClassifier, make_examples

TRAIN, EVAL = make_examples(35), make_examples(18, seed=9)
REPOSITORY = Path(__file__).resolve().parents[2]


def make_trainer(folder, model=None, callbacks=None, train=TRAIN, **changes) -> Trainer:
    values = {"num_train_epochs": 2, "learning_rate": 2e-2, "logging_steps": 1, "save_strategy": "no"}
    args = TrainingArguments(str(folder), **{**values, "progress": False, "max_buckets": 1, **changes})
    return Trainer(model or SmallClassifier(), args, train, EVAL, callbacks=callbacks)


def losses(trainer: Trainer) -> list[float]:
    return [line["loss"] for line in trainer.state.log_history if "loss" in line]


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_same_seed_gives_bitwise_the_same_losses(tmp_path, dropout):
    runs, steps = [], 25
    for name, seed in (("a", 3), ("b", 3), ("c", 4)):
        trainer = make_trainer(tmp_path / name, SmallClassifier(dropout=dropout), seed=seed, max_steps=steps)
        trainer.train()
        runs.append(losses(trainer))
    assert runs[0] == runs[1]
    assert runs[0] != runs[2]
    assert len(runs[0]) == steps


def test_resumed_run_equals_an_uninterrupted_one(tmp_path):
    options = {"gradient_accumulation_steps": 2, "logging_steps": 2, "warmup_steps": 2, "max_steps": 8}
    whole = make_trainer(tmp_path / "whole", save_strategy="steps", save_steps=5, **options)
    whole.train()
    rest = make_trainer(tmp_path / "rest", **options)  # step 5 is within an epoch and a line of the log
    rest.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-5"))
    assert losses(rest) == losses(whole)
    assert rest.state.total_loss == whole.state.total_loss
    for name, parameter in rest.model.parameters_and_names():
        np.testing.assert_array_equal(
            parameter.asnumpy(), dict(whole.model.parameters_and_names())[name].asnumpy()
        )
    lines = (tmp_path / "rest" / "train_log.jsonl").read_text().splitlines()
    assert [json.loads(line)["loss"] for line in lines] == losses(whole)


def test_resume_refuses_other_parameters_and_absent_checkpoints(tmp_path):
    make_trainer(tmp_path / "a", max_steps=1, save_strategy="steps", save_steps=1).train()
    model = SmallClassifier()
    model.head.bias.requires_grad = False
    with pytest.raises(InputError, match=r"'head.bias' is \(4,\) there and absent here"):
        make_trainer(tmp_path / "a", model).train(resume_from_checkpoint=True)
    with pytest.raises(InputError, match="holds no complete checkpoint"):
        make_trainer(tmp_path / "b").train(resume_from_checkpoint=True)
    assert not (tmp_path / "b").exists()


def test_best_model_is_reloaded_and_early_stopping_stops(tmp_path):
    class Spoil(TrainerCallback):
        """After the second evaluation the model gets worse with every step."""

        def on_step_end(self, args, state, control, model=None, **kwargs):
            if state.global_step > 4:
                model.head.bias.set_data(
                    Tensor(np.eye(LABELS)[0].astype(np.float32) * 10 * state.global_step)
                )

    trainer = make_trainer(
        tmp_path / "out",
        callbacks=[Spoil()],
        max_steps=20,
        eval_strategy="steps",
        eval_steps=2,
        save_strategy="steps",
        save_steps=2,
        save_total_limit=1,
        load_best_model_at_end=True,
        early_stopping_patience=2,
    )
    trainer.eval_dataset = TRAIN
    trainer.train()
    history = {line["step"]: line["eval_loss"] for line in trainer.state.log_history if "eval_loss" in line}
    best = min(history, key=history.get)
    assert best == 4
    assert trainer.state.global_step == 8  # the evaluations at 6 and 8 were worse
    assert trainer.state.best_step == best
    assert trainer.evaluate()["eval_loss"] == pytest.approx(history[best], abs=1e-6)
    names = {folder.name for folder in list_checkpoints(tmp_path / "out")}
    assert names == {f"checkpoint-{best}", "checkpoint-8"}


def test_callbacks_are_called_in_order_and_control_the_run(tmp_path):
    calls = []

    class Recorder(TrainerCallback):
        pass

    def make_hook(name):
        def hook(self, args, state, control, **kwargs):
            calls.append(name)
            if name == "on_step_end" and state.global_step == 2:
                control.should_evaluate = True
                control.should_training_stop = True

        return hook

    for name in [name for name in vars(TrainerCallback) if name.startswith("on_")]:
        setattr(Recorder, name, make_hook(name))
    trainer = make_trainer(
        tmp_path / "o", callbacks=[Recorder()], gradient_accumulation_steps=2, save_strategy="epoch"
    )
    trainer.train()
    step = ["on_step_begin", "on_substep_end", "on_step_end", "on_log"]
    after = ["on_log", "on_evaluate", "on_epoch_end", "on_save", "on_train_end"]
    assert calls == ["on_train_begin", "on_epoch_begin", *step, *step, *after]


def test_graph_count_is_the_number_of_shapes_and_mindspores_own(tmp_path):
    trainer = make_trainer(tmp_path / "out", train=TRAIN, max_buckets=2, lr_scheduler_type="cosine")
    masks = [1] * 20
    longer = [{"input_ids": masks, "attention_mask": masks, "labels": row["labels"]} for row in TRAIN]
    trainer.train_dataset = TRAIN + longer
    trainer.train()
    trainer.evaluate()
    shapes = {key[1][1] for key in trainer._runner.train_clock.seconds}
    assert len(shapes) == 2
    assert trainer._runner.graphs == trainer._runner.cached_graphs == 3
    assert 0 < trainer._runner.compile_seconds < 60
    assert trainer.report.graphs_compiled == 2


def test_pynative_gives_the_same_losses(tmp_path):
    graph = make_trainer(tmp_path / "g", max_steps=4)
    graph.train()
    eager = make_trainer(tmp_path / "p", max_steps=4, jit=False)
    try:
        eager.train()
    finally:
        ms.set_context(mode=ms.GRAPH_MODE)
    np.testing.assert_allclose(losses(graph), losses(eager), atol=1e-5)
    assert eager.report.graphs_compiled == 0


def test_files_of_a_run(tmp_path):
    trainer = make_trainer(tmp_path / "out", eval_strategy="epoch", save_strategy="epoch")
    output = trainer.train()
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {"checkpoint-5", "checkpoint-10", "train_log.jsonl", "curves.png", "model.safetensors"}
    assert {path.name for path in (tmp_path / "out" / "checkpoint-10").iterdir()} == {
        "model.safetensors",
        "optimizer.safetensors",
        "trainer_state.json",
    }
    assert (tmp_path / "out" / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert output.training_loss == pytest.approx(np.mean(losses(trainer)))
    assert dict(trainer.report.rows())["saved to"] == str(tmp_path / "out")


def test_output_dir_that_is_not_empty_is_refused_untouched(tmp_path):
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(InputError, match="not empty"):
        make_trainer(tmp_path).train()
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]
    make_trainer(tmp_path, overwrite_output_dir=True, max_steps=1).train()
    assert (tmp_path / "mine.txt").read_text() == "mine"


def test_non_finite_loss_stops_or_is_left_out(tmp_path):
    def broken():
        model = SmallClassifier()
        model.table.set_data(Tensor(np.full(model.table.shape, np.nan, np.float32)))
        return model

    with pytest.raises(NonFiniteLossError, match=r"loss nan at step 1 .*no checkpoint was written"):
        make_trainer(tmp_path / "a", broken()).train()
    model = broken()
    before = model.head.weight.asnumpy().copy()
    trainer = make_trainer(tmp_path / "b", model, stop_on_nonfinite_loss=False, max_steps=2)
    trainer.train()
    assert trainer.state.skipped_updates == 2
    np.testing.assert_array_equal(model.head.weight.asnumpy(), before)


def test_predict_keeps_the_order_of_the_data_set(tmp_path):
    trainer = make_trainer(tmp_path / "out", max_buckets=2, per_device_eval_batch_size=4)
    output = trainer.predict(EVAL)
    np.testing.assert_array_equal(output.label_ids, [row["labels"] for row in EVAL])
    row = EVAL[3]
    alone = trainer.model(Tensor([row["input_ids"]], ms.int32)).asnumpy()
    np.testing.assert_allclose(output.predictions[3], alone[0], atol=1e-5)
    assert output.metrics["test_accuracy"] == np.mean(output.predictions.argmax(-1) == output.label_ids)


def test_evaluation_loss_does_not_count_padding_rows(tmp_path):
    means = [
        make_trainer(tmp_path / "o", per_device_eval_batch_size=size).evaluate()["eval_loss"]
        for size in (18, 7)
    ]
    assert means[0] == pytest.approx(means[1], abs=1e-5)


def test_mindspore_dataset_is_accepted(tmp_path):
    ids = np.array([row["input_ids"][:5] for row in TRAIN], np.int32)
    columns = {"input_ids": ids, "labels": np.array([row["labels"] for row in TRAIN], np.int32)}
    trainer = make_trainer(
        tmp_path / "out", train=mindspore.dataset.NumpySlicesDataset(columns, shuffle=False)
    )
    plain = make_trainer(
        tmp_path / "plain",
        train=[
            {"input_ids": i.tolist(), "attention_mask": [1] * 5, "labels": int(n)}
            for i, n in zip(*columns.values(), strict=True)
        ],
    )
    trainer.train()
    plain.train()
    assert losses(trainer) == losses(plain)


SCRIPT = """
import sys
from mindpeft.train import Trainer, TrainerCallback, TrainingArguments, TrainingInterrupted
from tests.train.small import SmallClassifier, make_examples
import time
class Slow(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        print("step", state.global_step, flush=True)
        time.sleep(0.05)
args = TrainingArguments(sys.argv[1], num_train_epochs=200, save_strategy="steps", save_steps=3,
                         save_total_limit=2, progress=False, max_buckets=1)
try:
    Trainer(SmallClassifier(), args, make_examples(35), callbacks=[Slow()]).train()
except TrainingInterrupted as error:
    print(error)
    sys.exit(130)
"""


def test_ctrl_c_leaves_a_complete_checkpoint_and_nothing_else(tmp_path):
    script = tmp_path / "run.py"
    script.write_text(SCRIPT)
    process = subprocess.Popen(
        [sys.executable, str(script), str(tmp_path / "out")],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        cwd=REPOSITORY,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
    )
    for line in process.stdout:
        if line.startswith("step 7"):
            break
    time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    said = process.communicate(timeout=60)[0]
    assert process.returncode == 130
    last = list_checkpoints(tmp_path / "out")[-1]
    assert f"last complete checkpoint: {last}; resume with resume_from_checkpoint: true" in said
    assert len(list_checkpoints(tmp_path / "out")) == 2
    assert not list((tmp_path / "out").rglob(".*"))  # no temporary file or folder
    trainer = make_trainer(tmp_path / "out", max_steps=int(last.name.split("-")[1]) + 2)
    assert trainer.train(resume_from_checkpoint=True).global_step == trainer.state.max_steps
