"""Multitask prompt tuning against torch + peft on a small BERT."""

from __future__ import annotations

import mindspore as ms
import numpy as np
import peft
import pytest
import torch
from mindspore import Tensor
from safetensors.numpy import load_file

from mindpeft import MultitaskPromptTuningConfig, PeftModel, get_peft_model
from mindpeft.errors import InputError
from tests.tuners import prompts
from tests.tuners.prompts import (
    base_here,
    base_there,
    batch_for,
    check_files,
    check_gradients,
    gradients_here,
    gradients_there,
    labels_for,
    largest_error,
    loss_there,
    make_trainer,
    outputs_here,
    outputs_there,
)

pytestmark = pytest.mark.usefixtures("graph_mode")

METHOD = prompts.Method("MultitaskPromptTuningConfig", {"num_virtual_tokens": 4, "num_ranks": 2})
TASKS = {"task_ids": np.array([2, 0, 2], np.int32)}
NAMES = {"prompt_encoder.embedding.weight": "prompt_embeddings"}


def names(tensors):
    return {NAMES.get(name, name.removeprefix("prompt_encoder.")): value for name, value in tensors.items()}


@pytest.mark.parametrize("mode", [ms.GRAPH_MODE, ms.PYNATIVE_MODE])
@pytest.mark.parametrize("head", ["sequence", "token"])
def test_reading_what_peft_wrote(tmp_path, mode, head):
    ms.set_context(mode=mode)
    theirs, batch = METHOD.there(head, tmp_path / "theirs", num_tasks=3), batch_for(head)
    ours = PeftModel.from_pretrained(base_here(head), tmp_path / "theirs", is_trainable=True)
    ours.set_train(False)
    assert ours.get_nb_trainable_parameters() == theirs.get_nb_trainable_parameters()
    expected = outputs_there(theirs, batch, **TASKS)
    assert largest_error(outputs_here(ours, batch, **TASKS), expected) <= 1e-5
    other = {"task_ids": np.array([1, 0, 2], np.int32)}
    moved = outputs_here(ours, batch, **other)[0] - outputs_here(ours, batch, **TASKS)[0]
    assert np.abs(moved[0]).max() > 1e-4
    assert np.abs(moved[1:]).max() <= 1e-6
    with ours.disable_adapter():  # the argument may stay where it is
        assert largest_error(outputs_here(ours, batch, **TASKS), outputs_here(base_here(head), batch)) == 0
    ours.save_pretrained(tmp_path / "ours")
    check_files(tmp_path / "ours", tmp_path / "theirs")


@pytest.mark.parametrize("head", ["sequence", "token"])
def test_loss_and_gradients(tmp_path, head):
    theirs, batch = METHOD.there(head, tmp_path, num_tasks=3), batch_for(head)
    labels = labels_for(head, batch)
    loss = loss_there(theirs, head, batch, labels, **TASKS)
    loss.backward()
    ours = METHOD.here(head, num_tasks=3)
    prompts.take_over(ours, theirs, names)
    found, gradients = gradients_here(ours, batch, labels, **TASKS)
    assert found == pytest.approx(loss.item(), rel=1e-5)
    check_gradients(gradients, names(gradients_there(theirs)))


def test_writing_for_peft(tmp_path):
    ours, batch = METHOD.here("sequence", num_tasks=3), batch_for("sequence")
    ours.save_pretrained(tmp_path)
    theirs = peft.PeftModel.from_pretrained(base_there("sequence"), tmp_path).eval()
    expected = outputs_there(theirs, batch, **TASKS)
    assert largest_error(outputs_here(ours, batch, **TASKS), expected) <= 1e-5
    with pytest.raises(InputError, match="can't be merged"):
        ours.merge_adapter()


def test_one_task_need_not_be_told():
    model, batch = METHOD.here("sequence"), batch_for("sequence")
    told = outputs_here(model, batch, task_ids=np.zeros(3, np.int32))
    assert largest_error(outputs_here(model, batch), told) <= 1e-6


def test_switching():
    model, batch = METHOD.here("sequence", num_tasks=3), batch_for("sequence")
    model.add_adapter("second", METHOD.config_here(num_tasks=3))
    first = outputs_here(model, batch, **TASKS)
    model.set_adapter("second")
    second = outputs_here(model, batch, **TASKS)
    assert largest_error(first, second) > 1e-3
    model.set_adapter("default")
    assert largest_error(outputs_here(model, batch, **TASKS), first) == 0
    assert len(model.compile_cache) == 1


@pytest.fixture
def source(tmp_path):
    """The weights of an adapter of three source tasks, as a zip file of torch's and as safetensors."""
    METHOD.there("sequence", tmp_path, num_tasks=3)
    file = tmp_path / "adapter_model.safetensors"
    torch.save(
        {name: torch.tensor(value) for name, value in load_file(file).items()}, tmp_path / "source.bin"
    )
    return file


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("AVERAGE_SOURCE_TASKS", {}),
        ("EXACT_SOURCE_TASK", {"prompt_tuning_init_task": 2}),
        ("ONLY_SOURCE_SHARED", {"num_tasks": 2}),
    ],
)
@pytest.mark.parametrize("name", ["adapter_model.safetensors", "source.bin"])
def test_starting_from_source_tasks_as_in_peft(source, kind, options, name):
    path = str(source.with_name(name))
    options = {**options, "prompt_tuning_init": kind, "prompt_tuning_init_state_dict_path": path}
    ours = get_peft_model(base_here("sequence"), METHOD.config_here(**options))
    theirs = names(prompts.trained_there(METHOD.there("sequence", noise=0.0, **options)))
    found = {p.name: p.asnumpy() for p in ours.trainable_params() if "classifier" not in p.name}
    same = ["prompt_embeddings"] if kind == "ONLY_SOURCE_SHARED" else list(found)
    assert list(found) == ["prompt_embeddings", "prefix_task_cols", "prefix_task_rows"]
    for key, value in found.items():
        assert value.shape == tuple(theirs[key].shape)
        if key in same:
            np.testing.assert_allclose(value, theirs[key].detach(), atol=1e-7)
        else:
            assert 0.005 < value.std() < 0.05


def test_initial_values_are_distributed_as_pefts():
    ms.set_seed(0)
    options = {"num_virtual_tokens": 50, "num_ranks": 8, "num_tasks": 3}
    ours = get_peft_model(base_here("sequence"), METHOD.config_here(**options))
    theirs = names(prompts.trained_there(METHOD.there("sequence", noise=0.0, **options)))
    for parameter in ours.trainable_params():
        if "classifier" not in parameter.name:
            assert parameter.asnumpy().std() == pytest.approx(float(theirs[parameter.name].std()), rel=0.1)


def test_the_trainer_hands_the_tasks_over(tmp_path):
    def run(tasks):
        model = METHOD.here("sequence", num_tasks=2)
        trainer = make_trainer(
            tmp_path / str(tasks), model, {"task_ids": tasks}, max_steps=2, save_strategy="no"
        )
        trainer.train()
        return {p.name: p.asnumpy() for p in model.trainable_params()}

    start = {p.name: p.asnumpy() for p in METHOD.here("sequence", num_tasks=2).trainable_params()}
    for task in (0, 1):
        moved = np.abs(run(task)["prefix_task_cols"] - start["prefix_task_cols"]).max((1, 2))
        assert moved[task] > 1e-3 > moved[1 - task]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_tasks": 0}, "num_tasks must be a positive integer, not 0"),
        ({"num_ranks": 1.0}, "num_ranks must be a positive integer, not 1.0"),
        ({"prompt_tuning_init_task": -1}, "prompt_tuning_init_task must be an integer, 0 or more, not -1"),
        ({"prompt_tuning_init": "SAMPLE_VOCAB"}, "prompt_tuning_init must be one of TEXT, RANDOM, AVERAGE"),
        (
            {"prompt_tuning_init": "EXACT_SOURCE_TASK"},
            "EXACT_SOURCE_TASK needs prompt_tuning_init_state_dict_path",
        ),
        (
            {
                "prompt_tuning_init": "AVERAGE_SOURCE_TASKS",
                "prompt_tuning_init_state_dict_path": "x",
                "num_tasks": 2,
            },
            "AVERAGE_SOURCE_TASKS gives one task: num_tasks must be 1, not 2",
        ),
        ({"token_dim": 1}, "token_dim is 1, but the base model's is 48"),
        ({"num_virtual_tokens": 0}, "num_virtual_tokens must be a positive integer, not 0"),
    ],
)
def test_mistakes_in_the_config(options, message):
    with pytest.raises(InputError, match=message):
        MultitaskPromptTuningConfig(**{"num_virtual_tokens": 4, **options}).resolve(
            METHOD.here("sequence")._bank.base
        )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prompt_tuning_init_task": 3}, "prompt_tuning_init_task is 3, but .* has 3 tasks"),
        ({"num_virtual_tokens": 5}, r"prompt_embeddings gives the shape \(4, 48\), but \(5, 48\) is needed"),
        ({"num_ranks": 1}, r"prefix_task_cols gives the shape \(1, 4, 2\), but \(1, 4, 1\) is needed"),
        ({"prompt_tuning_init_state_dict_path": "/nowhere.safetensors"}, "/nowhere.safetensors"),
    ],
)
def test_mistakes_in_the_source(source, options, message):
    options = {
        "prompt_tuning_init": "EXACT_SOURCE_TASK",
        "prompt_tuning_init_state_dict_path": str(source),
        **options,
    }
    base = base_here("sequence")
    with pytest.raises(InputError, match=message):
        get_peft_model(base, METHOD.config_here(**options))
    assert all(parameter.requires_grad for parameter in base.get_parameters())


def test_several_tasks_must_be_told():
    model = METHOD.here("sequence", num_tasks=3)
    with pytest.raises(InputError, match="task_ids is missing: a number below 3 for each text of the batch"):
        model(Tensor(batch_for("sequence")["input_ids"]))
