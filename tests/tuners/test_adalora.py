"""AdaLoRA against torch + peft: the adapter, the training with its pruning, the files of pruned ranks."""

from __future__ import annotations

import json
from types import SimpleNamespace

import mindspore as ms
import numpy as np
import peft
import pytest
import torch
from safetensors.numpy import load_file

from mindpeft import AdaLoraConfig, PeftModel, get_peft_model
from mindpeft.errors import InputError
from mindpeft.train.optim import AdamW
from mindpeft.train.runner import StepRunner
from mindpeft.tuners.adalora import ADALORA_TARGETS
from tests.tuners.against_peft import (
    Method,
    check_initial_values,
    check_pynative,
    check_reading,
    check_switching,
    check_writing,
)

pytestmark = pytest.mark.usefixtures("graph_mode")


class AdaLora(Method):
    def in_peft(self, *args, **options):
        """PEFT counts each layer's constant `ranknum` among its parameters; leave it out."""
        model = super().in_peft(*args, **options)
        constants = sum("ranknum" in name for name, _ in model.named_parameters())
        trained, total = model.get_nb_trainable_parameters()
        model.get_nb_trainable_parameters = lambda: (trained, total - constants)
        return model


METHOD = AdaLora("AdaLoraConfig", {"total_step": 20, "init_lora_weights": False, "init_r": 5})
CASES = {
    "plain": {"target_modules": ["query", "value"], "lora_alpha": 16},
    "no_alpha": {"target_modules": ["query"], "lora_alpha": 0, "bias": "lora_only"},
    "conv1d": {"target_modules": ["c_attn", "intermediate"], "fan_in_fan_out": True},
    "tokens": {"target_modules": ["query"], "trainable_token_indices": {"words": [3, 5]}},
}
LABELS = np.array([0, 2, 1, 1], np.int32)
SCHEDULE = {"total_step": 24, "tinit": 3, "tfinal": 6, "init_r": 4, "target_r": 2, "orth_reg_weight": 0.3}


@pytest.mark.parametrize("name", CASES)
def test_reads_what_peft_wrote(twins, tmp_path, name):
    check_reading(twins, tmp_path, METHOD, **CASES[name])


def test_peft_reads_what_is_written(twins, tmp_path):
    check_writing(twins, tmp_path, METHOD, **CASES["plain"])


def test_pynative(twins, tmp_path):
    check_pynative(twins, tmp_path, METHOD, **CASES["conv1d"])


def test_switching_between_ranks(twins):
    check_switching(twins, METHOD, {"init_r": 8}, {"init_r": 3, "target_r": 2, "lora_alpha": 20})


@pytest.mark.parametrize("init", [True, False])
def test_initial_values(twins, init):
    options = {"target_modules": ["query", "value"], "init_r": 12, "init_lora_weights": init}
    check_initial_values(twins, METHOD, **options)


def test_default_targets_are_pefts():
    assert ADALORA_TARGETS == peft.utils.TRANSFORMERS_MODELS_TO_ADALORA_TARGET_MODULES_MAPPING


def torch_adalora(twins, folder, **options):
    """PEFT's model, whose base gives a loss, so that PEFT adds its term; saved before training."""
    torch.manual_seed(1)
    twin = twins.make_torch()
    logits_of = twin.forward

    def forward(input_ids, labels=None):
        logits = logits_of(input_ids)
        loss = None if labels is None else torch.nn.functional.cross_entropy(logits, labels)
        return SimpleNamespace(logits=logits, loss=loss)

    model = peft.PeftModel(twin, peft.AdaLoraConfig(**options))
    with torch.no_grad():  # E isn't zero: else the first importances are, and there are ties
        for name, parameter in model.named_parameters():
            if "lora_E" in name:
                parameter.normal_(0, 0.3)
            elif "lora_" in name:
                parameter.normal_(0, 0.2)
    model.save_pretrained(folder)
    twin.forward = forward
    return model


def train_torch(model, ids, steps, rate, clip=0.0):
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=rate, weight_decay=0.0)
    losses, patterns = [], []
    for step in range(1, steps + 1):
        loss = model.base_model(input_ids=torch.tensor(ids), labels=torch.tensor(LABELS).long()).loss
        loss.backward()
        if clip:
            torch.nn.utils.clip_grad_norm_(trained, clip)
        optimizer.step()
        model.base_model.update_and_allocate(step)
        optimizer.zero_grad()
        losses.append(loss.item())
        patterns.append(plain(model.peft_config["default"].rank_pattern))
    return losses, patterns


def plain(pattern):
    """PEFT's pattern with the names that it gives it when it is saved."""
    return None if pattern is None else {k.replace(".default", ""): v for k, v in pattern.items()}


def train_here(model, ids, steps, rate, clip=0.0, mode=ms.GRAPH_MODE):
    ms.set_context(mode=mode)
    runner = StepRunner(model, AdamW(model), max_grad_norm=clip)
    losses, patterns = [], []
    for step in range(1, steps + 1):
        losses.append(runner.train({"input_ids": ids, "labels": LABELS}, step, rate)[0])
        runner.hooks[0].write_back()
        patterns.append(model.peft_config["default"].rank_pattern)
    assert runner.cached_graphs <= 1  # twenty-odd steps of the schedule, one graph
    return losses, patterns


@pytest.mark.parametrize(
    ("options", "clip"),
    [
        pytest.param({"target_modules": ["query", "value"]}, 0.0, marks=pytest.mark.slow),
        ({"target_modules": ["query", "dense"], "deltaT": 4}, 0.05),
    ],
)
def test_training_and_pruning_equal_pefts(twins, tmp_path, options, clip):
    options = {**SCHEDULE, **options}
    theirs = torch_adalora(twins, tmp_path / "start", **options)
    ours = PeftModel.from_pretrained(twins.make_model(), tmp_path / "start", is_trainable=True)
    expected, their_patterns = train_torch(theirs, twins.IDS, 24, 1e-2, clip)
    found, our_patterns = train_here(ours, twins.IDS, 24, 1e-2, clip)
    np.testing.assert_allclose(found, expected, atol=1e-4)
    assert our_patterns == their_patterns
    counts = [None if p is None else sum(map(sum, p.values())) for p in our_patterns]
    layers = len(our_patterns[-1])
    assert counts[2] is None
    assert counts[-1] == 2 * layers  # the budget is met
    assert len(set(counts)) > 3
    ranks = {sum(left) for left in our_patterns[-1].values()}
    assert len(ranks) > 1  # and not evenly

    # The files of pruned ranks, both ways.
    logits = twins.logits(ours)
    ours.save_pretrained(tmp_path / "ours")
    theirs.save_pretrained(tmp_path / "theirs")
    files = {side: load_file(tmp_path / side / "adapter_model.safetensors") for side in ("ours", "theirs")}
    assert {k: v.shape for k, v in files["ours"].items()} == {k: v.shape for k, v in files["theirs"].items()}
    for name, value in files["theirs"].items():
        np.testing.assert_allclose(files["ours"][name], value, atol=2e-4, err_msg=name)
    configs = [json.loads((tmp_path / s / "adapter_config.json").read_text()) for s in ("ours", "theirs")]
    assert configs[0].keys() == configs[1].keys()
    assert configs[0]["rank_pattern"] == configs[1]["rank_pattern"]
    again = PeftModel.from_pretrained(twins.make_model(), tmp_path / "theirs")
    np.testing.assert_allclose(twins.logits(again), logits, atol=1e-3)
    again = PeftModel.from_pretrained(twins.make_model(), tmp_path / "ours")
    np.testing.assert_allclose(twins.logits(again), logits, atol=1e-6)
    opened = peft.PeftModel(twins.make_torch(), peft.PeftConfig.from_pretrained(tmp_path / "ours"))
    opened.load_adapter(tmp_path / "ours", "default")
    np.testing.assert_allclose(twins.torch_logits(opened.eval()), logits, atol=1e-5)
    # Cut ranks are written as they were read.
    again.save_pretrained(tmp_path / "twice")
    twice = load_file(tmp_path / "twice" / "adapter_model.safetensors")
    assert all(np.array_equal(value, files["ours"][name]) for name, value in twice.items())


def test_kernels_train_as_the_operators_do(twins, tmp_path, monkeypatch):
    options = {**SCHEDULE, "target_modules": ["query"], "tinit": 2, "total_step": 10, "tfinal": 2}
    torch_adalora(twins, tmp_path, **options)

    def trained():
        model = PeftModel.from_pretrained(twins.make_model(), tmp_path, is_trainable=True)
        runner = StepRunner(model, AdamW(model, weight_decay=0.1), max_grad_norm=0.05)
        batch = {"input_ids": twins.IDS, "labels": LABELS}
        results = [runner.train(batch, step, 1e-2) for step in range(1, 13)]
        kernel = runner._train_step.kernel
        values = [p.asnumpy() for p in (*model.trainable_params(), *runner.hooks[0].state().values())]
        return kernel, results, values, list(runner.optimizer.state_dict().values())

    kernel, *found = trained()
    if kernel is None:
        pytest.skip("no kernels here")
    for module in ("train.step", "tuners.adalora_pruning", "tuners.lora_layers"):
        monkeypatch.setattr(f"mindpeft.{module}.kernels_on", lambda: False)
    kernel, *expected = trained()
    assert kernel is None
    for mine, other in zip(found, expected, strict=True):
        for one, two in zip(mine, other, strict=True):
            np.testing.assert_allclose(one, two, rtol=1e-4, atol=2e-6)


@pytest.mark.slow
def test_pynative_trains_the_same_and_larger_slots_change_nothing(twins, tmp_path):
    options = {**SCHEDULE, "target_modules": ["query"], "tinit": 1, "total_step": 10, "tfinal": 2}
    torch_adalora(twins, tmp_path, **options)

    def model(rank=None):
        made = PeftModel.from_pretrained(twins.make_model(), tmp_path, is_trainable=True)
        if rank is not None:
            made.add_adapter("wide", AdaLoraConfig(total_step=5, init_r=rank, target_modules=["query"]))
        return made

    losses, patterns = train_here(model(), twins.IDS, 10, 1e-2)
    for other, mode in ((model(), ms.PYNATIVE_MODE), (model(7), ms.GRAPH_MODE)):
        found, same = train_here(other, twins.IDS, 10, 1e-2, mode=mode)
        np.testing.assert_allclose(found, losses, atol=1e-4)
        assert same == patterns


def test_evaluation_knows_no_penalty_and_training_does(twins):
    config = AdaLoraConfig(total_step=9, target_modules=["query"], orth_reg_weight=7.0)
    model = get_peft_model(twins.make_model(), config)
    batch = {"input_ids": twins.IDS, "labels": LABELS}
    runner = StepRunner(model, AdamW(model))
    plain_loss = runner.evaluate(batch)[0]
    assert runner.train(batch, 1, 0.0)[0] > plain_loss + 5
    assert runner.evaluate(batch)[0] == pytest.approx(plain_loss, abs=1e-5)
    assert StepRunner(twins.make_model()).evaluate(batch)[0] == pytest.approx(plain_loss, abs=1e-5)


def test_a_layer_pruned_to_nothing(twins, tmp_path):
    options = {"total_step": 9, "init_r": 3, "target_r": 1, "init_lora_weights": False}
    config = AdaLoraConfig(target_modules=["query"], **options)
    model = get_peft_model(twins.make_model(), config)
    left = {f"encoder.layer.{i}.attention.self.query.lora_E": [i > 0, i == 2, False] for i in range(3)}
    for path, kept in left.items():
        parameter = next(p for p in model.trainable_params() if p.name == path)
        parameter.set_data(ms.Tensor(parameter.asnumpy() * np.array(kept, np.float32)[:, None]))
    model.peft_config["default"].rank_pattern = left
    expected = twins.logits(model)
    model.save_pretrained(tmp_path)
    shapes = {k: v.shape for k, v in load_file(tmp_path / "adapter_model.safetensors").items()}
    assert {shape[1] for name, shape in shapes.items() if name.endswith("lora_B")} == {0, 1, 2}
    again = PeftModel.from_pretrained(twins.make_model(), tmp_path, is_trainable=True)
    np.testing.assert_allclose(twins.logits(again), expected, atol=1e-6)
    losses, patterns = train_here(again, twins.IDS, 9, 1e-3)
    assert np.isfinite(losses).all()
    assert [len(kept) for kept in patterns[-1].values()] == [0, 1, 2]
    again.save_pretrained(tmp_path / "again")
    PeftModel.from_pretrained(twins.make_model(), tmp_path / "again")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"total_step": None}, "total_step must be a positive integer, not None"),
        ({"total_step": 0}, "total_step must be a positive integer"),
        ({"tinit": 5, "tfinal": 5}, "leaves no update for pruning: tinit=5 and tfinal=5 fill total_step=10"),
        ({"deltaT": 0}, "deltaT must be a positive integer"),
        ({"beta1": 1.0}, "beta1 must lie between 0 and 1"),
        ({"orth_reg_weight": -0.1}, "orth_reg_weight must not be negative"),
        ({"init_r": 2.5}, "init_r must be a positive integer"),
        ({"tinit": -1}, "tinit must be an integer, 0 or more"),
        ({"use_dora": True}, "AdaLoRA does not know use_dora"),
        ({"use_rslora": True}, "AdaLoRA does not know use_rslora"),
        ({"alpha_pattern": {"query": 3}}, "AdaLoRA does not know alpha_pattern"),
        ({"init_lora_weights": "gaussian"}, "AdaLoRA's init_lora_weights is true or false"),
        ({"loftq_config": {"a": 1}}, "loftq_config="),
    ],
)
def test_refuses_bad_values(options, message):
    with pytest.raises(InputError, match=message):
        AdaLoraConfig(**{"total_step": 10, **options})


def test_refuses_a_budget_beyond_the_start(twins):
    config = AdaLoraConfig(total_step=9, target_r=13, target_modules=["query"])
    model = get_peft_model(twins.make_model(), config)
    with pytest.raises(InputError, match="target_r=13 must not be more than init_r=12"):
        StepRunner(model, AdamW(model))


def test_refuses_embeddings(twins):
    with pytest.raises(InputError, match="AdaLoRA can't wrap the cell 'words'"):
        get_peft_model(twins.make_model(), AdaLoraConfig(total_step=9, target_modules=["words"]))
