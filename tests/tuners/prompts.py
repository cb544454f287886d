"""Methods that add virtual positions, on a small BERT here and in torch + transformers + peft."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from types import MappingProxyType
from typing import Any

import mindspore as ms
import numpy as np
import peft
import pytest
import torch
import transformers
from mindspore import Tensor
from safetensors.numpy import load_file

import mindpeft
from mindpeft import PeftModel, get_peft_model
from mindpeft.errors import InputError
from mindpeft.train import Trainer, TrainingArguments
from mindpeft.train.step import EvalStep
from tests.models.reference import (
    HEADS,
    absolute_error,
    make_batch,
    make_reference,
    open_ours,
    run_ours,
    run_theirs,
    to_numpy,
    to_torch,
)
from tests.parity.adapters import add_noise, randomise

CLASSES = {"sequence": 4, "token": 5}
TASKS = {
    "sequence": "SEQ_CLS",
    "token": "TOKEN_CLS",
    "answer": "QUESTION_ANS",
    "masked": "FEATURE_EXTRACTION",  # PEFT has no task of its own for it; the model inside is called alike
    "features": "FEATURE_EXTRACTION",
}
Batch = dict[str, np.ndarray]
_folder = TemporaryDirectory()


@cache
def base_folder(head: str) -> Path:
    """The folder of a small random BERT with that head, made once."""
    folder = Path(_folder.name) / head
    make_reference(head, folder, num_labels=CLASSES.get(head, 2))
    return folder


def base_here(head: str, **options: Any) -> ms.nn.Cell:
    return open_ours(head, base_folder(head), **options)


def base_there(head: str) -> torch.nn.Module:
    auto = getattr(transformers, HEADS[head])
    return auto.from_pretrained(base_folder(head), attn_implementation="eager").eval()


def batch_for(head: str, **options: Any) -> Batch:
    """A batch; without token types where PEFT leaves them out."""
    batch = make_batch(**options)
    if TASKS[head] in ("FEATURE_EXTRACTION", "QUESTION_ANS"):
        del batch["token_type_ids"]
    return batch


def labels_for(head: str, batch: Batch, seed: int = 5) -> np.ndarray:
    rows, length = batch["input_ids"].shape
    random = np.random.default_rng(seed)
    if head == "answer":
        return random.integers(0, length, (rows, 2)).astype(np.int32)
    shape = (rows,) if head == "sequence" else (rows, length)
    labels = random.integers(0, CLASSES.get(head, 61), shape).astype(np.int32)
    if head != "sequence":
        labels[batch["attention_mask"] == 0] = -100
    return labels


@dataclass(frozen=True)
class Method:
    """A method: its config's name here and in PEFT, and the arguments that each test gives it."""

    config: str
    options: Mapping[str, Any]

    def here(self, head: str, seed: int = 11, **options: Any) -> PeftModel:
        """A model with a fresh adapter and noise on all that is trained."""
        ms.set_seed(seed)
        model = get_peft_model(base_here(head), self.config_here(head, **options)).set_train(False)
        randomise(model)
        return model

    def config_here(self, head: str = "sequence", **options: Any) -> mindpeft.PeftConfig:
        config = getattr(mindpeft, self.config)
        return config(**{"task_type": TASKS[head], **self.options, **options})

    def there(
        self, head: str, folder: Path | None = None, noise: float = 0.05, **options: Any
    ) -> peft.PeftModel:
        """The same in PEFT, saved if a folder is given."""
        torch.manual_seed(3)
        config = getattr(peft, self.config)(**{"task_type": TASKS[head], **self.options, **options})
        model = peft.get_peft_model(base_there(head), config)
        add_noise(model, noise)
        model.eval()
        if folder is not None:
            model.save_pretrained(folder)
        return model


def outputs_there(model: torch.nn.Module, batch: Batch, **more: Any) -> list[torch.Tensor]:
    """What a model of transformers or PEFT gives, in our form; of real tokens alone."""
    result = run_theirs(model, **batch, **more)
    if hasattr(result, "start_logits"):
        parts = [torch.stack((result.start_logits, result.end_logits), -1)]
    else:
        parts = [result.logits] if hasattr(result, "logits") else [result[0], result[1]]
    length = batch["input_ids"].shape[1]
    return [part[:, -length:] if part.ndim == 3 else part for part in parts]


def outputs_here(model: ms.nn.Cell, batch: Batch, **more: Any) -> list[np.ndarray]:
    result = run_ours(model, **batch, **more)
    return [to_numpy(part) for part in (result if isinstance(result, tuple) else (result,))]


def largest_error(found: list, expected: list) -> float:
    return max(absolute_error(mine, other) for mine, other in zip(found, expected, strict=True))


def loss_there(model: peft.PeftModel, head: str, batch: Batch, labels: np.ndarray, **more: Any):
    """The loss over the real tokens; of spans over all positions, virtual ones included."""
    if head == "answer":
        start, end = to_torch(labels + more.pop("shift", 0)).T
        return run_theirs(model, **batch, **more, start_positions=start, end_positions=end).loss
    logits = outputs_there(model, batch, **more)[0]
    return torch.nn.functional.cross_entropy(logits.flatten(0, -2), to_torch(labels).flatten())


def gradients_here(model: PeftModel, batch: Batch, labels: np.ndarray, **more: np.ndarray):
    """(loss, parameter's name -> gradient)."""
    columns = {**batch, **more, "labels": labels}
    parameters, step = model.trainable_params(), EvalStep(model, tuple(columns))

    def forward(*values):
        return step(*values)[0]

    function = ms.value_and_grad(forward, None, ms.ParameterTuple(parameters))
    loss, gradients = function(*map(Tensor, columns.values()))
    return float(loss), {p.name: g.asnumpy() for p, g in zip(parameters, gradients, strict=True)}


def check_gradients(found: Mapping[str, np.ndarray], expected: Mapping[str, torch.Tensor]) -> float:
    """The largest error of a gradient, relative to its largest entry or a hundredth of the largest of all."""
    assert found.keys() == expected.keys()
    # Softmax over positions does not see a bias that they share: its gradient is rounding alone.
    expected = {name: value for name, value in expected.items() if name != "qa_outputs.bias"}
    floor = 1e-2 * max(float(value.abs().max()) for value in expected.values())
    errors = {
        name: absolute_error(found[name], value) / max(float(value.abs().max()), floor)
        for name, value in expected.items()
    }
    assert max(errors.values()) <= 1e-4, errors
    return max(errors.values())


def plain_name(name: str) -> str:
    """A parameter's name in PEFT without what its wrappers add."""
    name = name.removeprefix("base_model.").replace(".modules_to_save.default.", ".")
    return name.replace(".default", "")


def trained_there(model: peft.PeftModel) -> dict[str, torch.Tensor]:
    """Name -> value of what is trained in PEFT."""
    return {plain_name(name): value for name, value in model.named_parameters() if value.requires_grad}


def gradients_there(model: peft.PeftModel) -> dict[str, torch.Tensor]:
    """Name -> gradient of what is trained in PEFT, after ``backward``."""
    return {name: value.grad for name, value in trained_there(model).items() if value.grad is not None}


def take_over(ours: PeftModel, theirs: peft.PeftModel, names: Callable[[dict], dict]) -> None:
    """Give what is trained here the values that it has in PEFT; ``names`` turns PEFT's names into ours."""
    values = names(trained_there(theirs))
    assert values.keys() == {parameter.name for parameter in ours.trainable_params()}
    for parameter in ours.trainable_params():
        parameter.set_data(Tensor(values[parameter.name].detach().numpy().copy()))


def check_files(ours: Path, theirs: Path, exact: bool = True) -> None:
    """Two folders hold configs of the same keys and values, and the same tensors."""
    tensors = [load_file(folder / "adapter_model.safetensors") for folder in (ours, theirs)]
    assert tensors[0].keys() == tensors[1].keys()
    for name, value in tensors[1].items():
        np.testing.assert_allclose(tensors[0][name], value, rtol=0, atol=0 if exact else 1e-6, err_msg=name)
    mine, other = (json.loads((folder / "adapter_config.json").read_text()) for folder in (ours, theirs))
    for config in (mine, other):
        config.pop("base_model_name_or_path")
        config["modules_to_save"] = sorted(set(config["modules_to_save"] or ()))  # PEFT lists heads twice
    assert mine == other


def check_reading(method: Method, head: str, folder: Path, **options: Any) -> PeftModel:
    """An adapter of PEFT's gives its outputs here, and is written again as it was; off it does nothing."""
    theirs = method.there(head, folder / "theirs", **options)
    batch = batch_for(head)
    expected = outputs_there(theirs, batch)
    assert largest_error(expected, outputs_there(base_there(head), batch)) > 1e-2
    ours = PeftModel.from_pretrained(base_here(head), folder / "theirs", is_trainable=True)
    ours.set_train(False)
    assert largest_error(outputs_here(ours, batch), expected) <= 1e-5
    with ours.disable_adapter():
        bare = outputs_here(base_here(head), batch)
        assert largest_error(outputs_here(ours, batch), bare) == 0
    assert largest_error(outputs_here(ours, batch), expected) <= 1e-5
    ours.save_pretrained(folder / "ours")
    check_files(folder / "ours", folder / "theirs")
    return ours


def check_writing(method: Method, head: str, folder: Path, **options: Any) -> None:
    """PEFT opens a fresh adapter of ours and gives the same; merging is refused, unloading gives the base."""
    ours = method.here(head, **options)
    ours.save_pretrained(folder)
    theirs = peft.PeftModel.from_pretrained(base_there(head), folder).eval()
    batch = batch_for(head)
    found = outputs_here(ours, batch)
    assert largest_error(found, outputs_there(theirs, batch)) <= 1e-5
    again = PeftModel.from_pretrained(base_here(head), folder)
    assert largest_error(outputs_here(again, batch), found) <= 1e-5
    before = ours.get_nb_trainable_parameters()
    assert before == method.there(head, **options).get_nb_trainable_parameters()
    with pytest.raises(InputError, match="can't be merged"):
        ours.merge_adapter()
    assert largest_error(outputs_here(ours, batch), found) == 0
    bare = ours.unload()
    assert type(bare) is type(base_here(head))
    assert largest_error(outputs_here(bare, batch), outputs_here(base_here(head), batch)) == 0


def check_loss_and_gradients(
    method: Method, head: str, folder: Path, names: Callable[[dict], dict] = dict, **options: Any
) -> None:
    """A fresh adapter with PEFT's values has its loss, gradients, numbers and files.

    Args:
        names: from PEFT's names of the tensors to ours.
    """
    theirs, batch = method.there(head, folder / "theirs", **options), batch_for(head)
    labels = labels_for(head, batch)
    loss = loss_there(theirs, head, batch, labels)
    loss.backward()
    ours = method.here(head, **options)
    take_over(ours, theirs, names)
    assert ours.get_nb_trainable_parameters() == theirs.get_nb_trainable_parameters()
    found, gradients = gradients_here(ours, batch, labels)
    assert found == pytest.approx(loss.item(), rel=1e-5)
    check_gradients(gradients, names(gradients_there(theirs)))
    ours.save_pretrained(folder / "ours")
    check_files(folder / "ours", folder / "theirs", exact=False)


def check_switching(method: Method, **other: Any) -> None:
    """Adapters of one shape share a graph; one of another shape (``other``) answers as it does alone."""
    model, batch = method.here("sequence"), batch_for("sequence")
    for name, options in (("second", {}), ("third", other)):
        model.add_adapter(name, method.config_here(**options))
        model.set_adapter(name)
        randomise(model, seed=len(name))
    answers = {}
    for name in ("third", "default", "second"):
        model.set_adapter(name)
        answers[name] = outputs_here(model, batch)
    assert largest_error(answers["default"], answers["second"]) > 1e-3
    compiled = len(model.compile_cache)
    for name in ("default", "second", "default"):
        model.set_adapter(name)
        assert largest_error(outputs_here(model, batch), answers[name]) == 0
    assert len(model.compile_cache) == compiled == 1
    model.set_adapter("third")
    alone = TemporaryDirectory()
    model.save_pretrained(alone.name)
    again = PeftModel.from_pretrained(base_here("sequence"), Path(alone.name) / "third")
    assert largest_error(outputs_here(again, batch), answers["third"]) <= 1e-6


def make_trainer(
    folder: Path, model: PeftModel, more: Mapping[str, Any] = MappingProxyType({}), **changes: Any
):
    """A trainer on twelve texts; ``more`` are further columns, of one value."""
    rows = enumerate(make_batch(batch=12, padded=False)["input_ids"].tolist())
    examples = [
        {"input_ids": row, "attention_mask": [1] * len(row), "labels": number % 4, **more}
        for number, row in rows
    ]
    values = {"max_steps": 6, "learning_rate": 1e-2, "logging_steps": 1, "max_buckets": 1, "progress": False}
    return Trainer(model, TrainingArguments(str(folder), **{**values, **changes}), examples, None)


def check_resuming(method: Method, folder: Path, **options: Any) -> None:
    """A run goes on from a checkpoint as if it had not stopped, and its adapter opens and trains again."""
    whole = make_trainer(
        folder / "a", method.here("sequence", **options), save_strategy="steps", save_steps=4
    )
    whole.train()
    losses = [line["loss"] for line in whole.state.log_history if "loss" in line]
    assert losses[-1] < losses[0]
    rest = make_trainer(folder / "b", method.here("sequence", **options), save_strategy="no")
    rest.train(resume_from_checkpoint=str(folder / "a" / "checkpoint-4"))
    assert [line["loss"] for line in rest.state.log_history if "loss" in line] == losses
    again = PeftModel.from_pretrained(base_here("sequence"), folder / "a" / "checkpoint-4", is_trainable=True)
    further = make_trainer(folder / "c", again, save_strategy="no", max_steps=2)
    further.train()
    first = next(line["loss"] for line in further.state.log_history if "loss" in line)
    assert first < losses[0]
