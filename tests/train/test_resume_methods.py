"""A run that stops in the middle and is resumed equals an uninterrupted one, whatever the method keeps."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pytest
from mindspore import Tensor, nn

from mindpeft import (
    AdaLoraConfig,
    AdapterFusionConfig,
    BitFitConfig,
    DiffPruningConfig,
    LoraConfig,
    PeftConfig,
    PeftModel,
    PromptEncoderConfig,
    SeqBnConfig,
    get_peft_model,
)
from mindpeft.train import Trainer, TrainerCallback, TrainingArguments
from mindpeft.train.checkpoints import list_checkpoints
from mindpeft.tuners.diff_pruning_layers import DiffLayer
from tests.train.small import SmallClassifier, make_examples
from tests.train.test_bert import make_bert

EXAMPLES = make_examples(36)  # 5 micro-batches, 3 updates an epoch
STEPS = 10
_folder = TemporaryDirectory()


class PowerCut(Exception):
    pass


class CutAfter(TrainerCallback):
    """Ends a run without any tidying up."""

    def __init__(self, step: int):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            raise PowerCut


class FixedNoise(nn.Cell):
    """The same noise in every step: what a run draws depends on where it began."""

    def construct(self, shape):
        return Tensor(np.random.default_rng(len(shape)).normal(0, 1.0, shape).astype(np.float32))


@dataclass(frozen=True)
class Method:
    """How a model with the adapter is made, and what the run is given besides."""

    configs: Callable[[], object]
    base: Callable[[], nn.Cell] = SmallClassifier
    fixed_noise: bool = False
    arguments: dict = field(default_factory=dict)

    def model(self, seed: int) -> PeftModel:
        """Different seeds give different beginnings: what a checkpoint lacks shows."""
        np.random.seed(seed)
        model = get_peft_model(self.base(), self.configs())
        for _, cell in model.cells_and_names() if self.fixed_noise else ():
            if isinstance(cell, DiffLayer):
                cell.noise = FixedNoise()
        return model


def lora() -> LoraConfig:
    return LoraConfig(r=3, target_modules=["hidden", "head"], init_lora_weights=False)


def adalora() -> AdaLoraConfig:
    """Prunes after the updates 4, 6 and 8."""
    return AdaLoraConfig(
        init_r=4,
        target_r=2,
        tinit=2,
        tfinal=2,
        deltaT=2,
        total_step=STEPS,
        target_modules=["hidden", "head"],
        init_lora_weights=False,
    )


def diff_pruning() -> DiffPruningConfig:
    return DiffPruningConfig(
        target_modules=["hidden", "norm"],
        structured=True,
        alpha_init=0.5,
        l0_weight=1e-3,
        prune_step=4,
        target_fraction=0.25,
    )


def p_tuning() -> PromptEncoderConfig:
    return PromptEncoderConfig(task_type="SEQ_CLS", num_virtual_tokens=3, encoder_hidden_size=12)


def fusion() -> list[PeftConfig]:
    """The temperature falls with each update, and the value matrices are penalised."""
    mixing = AdapterFusionConfig(adapter_names=["a", "b"], temperature=True, task_type="SEQ_CLS")
    return [SeqBnConfig(), SeqBnConfig(init_weights="houlsby"), mixing]


METHODS = {
    "adalora": Method(adalora),
    "diff pruning": Method(diff_pruning),
    "diff pruning, fixed noise": Method(diff_pruning, fixed_noise=True),
    "p-tuning": Method(p_tuning, base=lambda: make_bert(layers=1)),
    "lora+": Method(lora, arguments={"loraplus_lr_ratio": 8.0}),
    "lora-fa": Method(lora, arguments={"optim": "lorafa"}),
    "fusion": Method(fusion, base=lambda: make_bert(layers=1)),
    "hybrid": Method(lambda: [lora(), BitFitConfig(target_modules=["norm"])]),
}


def make_trainer(folder: Path, method: Method, seed: int, given: dict | None = None, **changes) -> Trainer:
    values = {
        "max_steps": STEPS,
        "learning_rate": 3e-2,
        "weight_decay": 0.01,
        "warmup_steps": 3,
        "gradient_accumulation_steps": 2,
        "logging_steps": 2,
        "save_strategy": "no",
        "progress": False,
        "max_buckets": 1,
    }
    args = TrainingArguments(str(folder), **{**values, **method.arguments, **changes})
    return Trainer(method.model(seed), args, EXAMPLES, **(given or {}))


@cache
def uninterrupted(name: str) -> Trainer:
    """A run that writes no checkpoint, for writing one must not change a run either."""
    trainer = make_trainer(Path(_folder.name) / name, METHODS[name], seed=1)
    trainer.train()
    return trainer


def resumed(name: str, folder: Path, step: int) -> Trainer:
    """A run that is cut after the update that follows the checkpoint of ``step``, and goes on from there."""
    given = {"callbacks": [CutAfter(step + 1)]}
    cut = make_trainer(folder, METHODS[name], 1, given, save_strategy="steps", save_steps=step)
    with pytest.raises(PowerCut):
        cut.train()
    assert [path.name for path in list_checkpoints(folder)] == [f"checkpoint-{step}"]
    rest = make_trainer(folder, METHODS[name], seed=2)
    rest.train(resume_from_checkpoint=True)
    return rest


def losses(trainer: Trainer) -> list[float]:
    return [line["loss"] for line in trainer.state.log_history]


def values_of(trainer: Trainer) -> dict[str, np.ndarray]:
    """All that training holds: parameters, frozen ones too, moments, and the state of the hooks."""
    values = {path: p.asnumpy() for path, p in trainer.model.parameters_and_names()}
    for number, hook in enumerate(trainer._runner.hooks):
        values |= {f"hook {number} {name}": p.asnumpy() for name, p in hook.state().items()}
    return values | trainer.optimizer.state_dict()


def assert_equal_runs(rest: Trainer, whole: Trainer) -> None:
    assert losses(rest) == losses(whole)
    assert rest.state.total_loss == whole.state.total_loss
    found, wanted = values_of(rest), values_of(whole)
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        np.testing.assert_array_equal(found[name], value, err_msg=name)
    files = adapter_files(whole.output_dir)
    assert files
    assert adapter_files(rest.output_dir) == files


def adapter_files(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*adapter*")
        if path.is_file() and not path.relative_to(folder).parts[0].startswith("checkpoint-")
    }


@pytest.mark.parametrize(
    ("name", "step"),
    [
        ("adalora", 5),  # between two prunings
        pytest.param("adalora", 9, marks=pytest.mark.slow),  # after the last one
        pytest.param("diff pruning, fixed noise", 3, marks=pytest.mark.slow),  # before the pruning
        # right after it: the gates stand so wide open, or closed, that noise changes nothing
        ("diff pruning", 4),
        pytest.param("p-tuning", 5, marks=pytest.mark.slow),
        ("lora+", 5),
        pytest.param("lora-fa", 5, marks=pytest.mark.slow),
        pytest.param("hybrid", 5, marks=pytest.mark.slow),
        pytest.param("fusion", 5, marks=pytest.mark.slow),
    ],
)
def test_resumed_run_equals_an_uninterrupted_one(tmp_path, name, step):
    assert_equal_runs(resumed(name, tmp_path, step), uninterrupted(name))


def test_the_best_model_is_reloaded_with_the_ranks_it_had(tmp_path):
    scores = iter(range(STEPS))
    trainer = make_trainer(
        tmp_path,
        METHODS["adalora"],
        1,
        {"eval_dataset": EXAMPLES[:4], "compute_metrics": lambda _: {"score": next(scores)}},
        eval_strategy="steps",
        eval_steps=3,
        save_strategy="steps",
        save_steps=3,
        load_best_model_at_end=True,
        metric_for_best_model="score",
        greater_is_better=False,
    )
    trainer.train()
    assert trainer.state.best_step == 3  # none was pruned yet
    assert adapter_files(tmp_path) == adapter_files(tmp_path / "checkpoint-3")
    pattern = json.loads((tmp_path / "checkpoint-9" / "adapter_config.json").read_text())["rank_pattern"]
    assert sum(map(sum, pattern.values())) == 4


def test_ranks_that_were_pruned_earlier(tmp_path):
    pruned = uninterrupted("adalora")
    pattern = pruned.model.peft_config["default"].rank_pattern
    again = PeftModel.from_pretrained(SmallClassifier(), pruned.output_dir, is_trainable=True)
    again.training_hooks()  # as a new run begins
    again.save_pretrained(tmp_path / "read")  # the ranks cut away stay away
    assert adapter_files(tmp_path / "read") == adapter_files(pruned.output_dir)
    fresh = METHODS["adalora"].model(seed=1)
    fresh.peft_config["default"].rank_pattern = pattern  # as a run over the same model has left it
    fresh.training_hooks()
    fresh.save_pretrained(tmp_path / "fresh")  # a new run trains all ranks, and has pruned none
    assert json.loads((tmp_path / "fresh" / "adapter_config.json").read_text())["rank_pattern"] is None
