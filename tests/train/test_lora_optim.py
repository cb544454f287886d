"""LoRA+ and LoRA-FA against PEFT's optimizers: twenty steps in one compiled graph on the twin models."""

from __future__ import annotations

import mindspore as ms
import numpy as np
import peft
import pytest
import torch
from peft.optimizers import create_loraplus_optimizer, lorafa

from mindpeft import IA3Config, LoraConfig, PeftModel, get_peft_model
from mindpeft.errors import InputError
from mindpeft.recipe import load_recipe
from mindpeft.train import TrainingArguments
from mindpeft.train.callbacks import TrainerState
from mindpeft.train.checkpoints import load_checkpoint, save_checkpoint
from mindpeft.train.lora_optim import make_optimizer
from mindpeft.train.runner import StepRunner

STEPS = 20
LABELS = np.array([0, 2, 1, 1], np.int32)
OPTIONS = {"r": 4, "target_modules": ["query", "intermediate", "c_attn"], "modules_to_save": ["classifier"]}


def pair(twins, folder, **options):
    """The same fresh adapter, trainable, in PEFT and here."""
    torch.manual_seed(1)
    theirs = peft.PeftModel(twins.make_torch(), peft.LoraConfig(**{**OPTIONS, **options}))
    theirs.save_pretrained(folder)
    return theirs, PeftModel.from_pretrained(twins.make_model(), folder, is_trainable=True)


def arguments(**options):
    return TrainingArguments("out", **options)


def torch_curve(twins, model, optimizer, rates):
    losses, trained = [], [p for p in model.parameters() if p.requires_grad]
    start = [group["lr"] for group in optimizer.param_groups]
    for rate in rates:
        for group, first in zip(optimizer.param_groups, start, strict=True):
            group["lr"] = first * rate
        logits = model.get_base_model()(torch.tensor(twins.IDS))
        loss = torch.nn.functional.cross_entropy(logits, torch.tensor(LABELS).long())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def our_curve(twins, model, args, rates, first=1, optimizer=None):
    optimizer = optimizer or make_optimizer(model, args)
    runner = StepRunner(model, optimizer)
    batch = {"input_ids": twins.IDS, "labels": LABELS}
    losses = [
        runner.train(batch, step, args.learning_rate * rate)[0] for step, rate in enumerate(rates, first)
    ]
    assert runner.graphs == 1
    return losses


SCHEDULE = np.linspace(1.0, 0.1, STEPS)


@pytest.mark.parametrize(
    "options",
    [
        pytest.param({}, id="plain", marks=pytest.mark.slow),
        pytest.param({"use_dora": True, "bias": "lora_only"}, id="dora"),
        pytest.param(
            {"target_modules": ["query", "words", "kinds"], "init_lora_weights": False},
            id="embeddings",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_loraplus_curve(twins, tmp_path, options):
    theirs, ours = pair(twins, tmp_path, **options)
    args = arguments(learning_rate=1e-3, loraplus_lr_ratio=16.0, loraplus_lr_embedding=5e-3, weight_decay=0.1)
    optimizer = create_loraplus_optimizer(
        theirs,
        torch.optim.AdamW,
        lr=1e-3,
        loraplus_lr_ratio=16.0,
        loraplus_lr_embedding=5e-3,
        loraplus_weight_decay=0.1,
    )
    expected = torch_curve(twins, theirs, optimizer, SCHEDULE)
    found = our_curve(twins, ours, args, SCHEDULE)
    np.testing.assert_allclose(found, expected, atol=1e-3)
    assert found[-1] < found[0] - 0.1
    check_weights(ours, theirs)


def check_weights(ours, theirs):
    """All that is trained ended where PEFT's did."""
    state = {
        key.removeprefix("base_model.model.")
        .replace(".modules_to_save.default.", ".")
        .replace(".default", "")
        .replace(".base_layer.", ".")
        .replace("vector.weight", "vector"): value.detach().numpy()
        for key, value in theirs.named_parameters()
    }
    for parameter in ours.trainable_params():
        name = parameter.name.replace("LayerNorm.beta", "LayerNorm.bias")
        np.testing.assert_allclose(parameter.asnumpy(), state[name], atol=2e-3, err_msg=name)


def test_loraplus_differs_from_adamw(twins, tmp_path):
    plain, fast = (pair(twins, tmp_path)[1] for _ in range(2))
    losses = our_curve(twins, plain, arguments(learning_rate=1e-3), SCHEDULE)
    faster = our_curve(twins, fast, arguments(learning_rate=1e-3, loraplus_lr_ratio=16.0), SCHEDULE)
    assert faster[-1] < losses[-1] - 0.1


@pytest.mark.parametrize(
    "options",
    [pytest.param({}, marks=pytest.mark.slow), {"use_rslora": True, "rank_pattern": {"query": 2}}],
    ids=str,
)
def test_lorafa_curve(twins, tmp_path, monkeypatch, options):
    # PEFT projects in bfloat16, which would hide errors of a percent.
    monkeypatch.setattr(lorafa, "is_bf16_available", lambda: False)
    theirs, ours = pair(twins, tmp_path, **options)
    # The saved head is trained as well; nothing decays, since PEFT decays biases and norms here too.
    optimizer = lorafa.create_lorafa_optimizer(theirs, r=4, lora_alpha=8, lr=5e-3)
    frozen = ours.base_model.c_attn.lora_A.weight.asnumpy().copy()
    expected = torch_curve(twins, theirs, optimizer, SCHEDULE)
    args = arguments(learning_rate=5e-3, optim="lorafa", adam_epsilon=1e-6)
    found = our_curve(twins, ours, args, SCHEDULE)
    np.testing.assert_allclose(found, expected, atol=1e-3)
    assert found[-1] < found[0] - 0.1
    np.testing.assert_array_equal(ours.base_model.c_attn.lora_A.weight.asnumpy(), frozen)
    assert not any("lora_A" in parameter.name for parameter in ours.trainable_params())
    check_weights(ours, theirs)


def test_lorafa_decays_after_the_step(twins, tmp_path, monkeypatch):
    monkeypatch.setattr(lorafa, "is_bf16_available", lambda: False)
    theirs, ours = pair(twins, tmp_path, modules_to_save=None)
    optimizer = lorafa.create_lorafa_optimizer(theirs, r=4, lora_alpha=8, lr=5e-2, weight_decay=0.5)
    torch_curve(twins, theirs, optimizer, [1.0] * 3)
    args = arguments(learning_rate=5e-2, optim="lorafa", adam_epsilon=1e-6, weight_decay=0.5)
    our_curve(twins, ours, args, [1.0] * 3)
    check_weights(ours, theirs)


def test_lorafa_in_a_larger_slot(twins):
    def curve(slot_rank):
        ms.set_seed(3)
        model = get_peft_model(twins.make_model(), LoraConfig(**OPTIONS), slot_rank=slot_rank)
        return our_curve(twins, model, arguments(learning_rate=5e-3, optim="lorafa"), [1.0] * 5)

    np.testing.assert_allclose(curve(9), curve(None), atol=1e-5)


def test_lorafa_goes_on_from_a_checkpoint(twins, tmp_path):
    """With A from the checkpoint, though the new model began with another one."""
    args = arguments(learning_rate=5e-3, optim="lorafa")
    ms.set_seed(3)
    whole = get_peft_model(twins.make_model(), LoraConfig(**OPTIONS))
    expected = our_curve(twins, whole, args, [1.0] * 6)
    ms.set_seed(3)
    first = get_peft_model(twins.make_model(), LoraConfig(**OPTIONS))
    optimizer = make_optimizer(first, args)
    our_curve(twins, first, args, [1.0] * 3, optimizer=optimizer)
    save_checkpoint(tmp_path / "checkpoint", first, optimizer, TrainerState())
    ms.set_seed(4)
    second = get_peft_model(twins.make_model(), LoraConfig(**OPTIONS))
    optimizer = make_optimizer(second, args)
    load_checkpoint(tmp_path / "checkpoint", optimizer)
    found = our_curve(twins, second, args, [1.0] * 3, first=4, optimizer=optimizer)
    np.testing.assert_allclose(found, expected[3:], atol=1e-6)
    with pytest.raises(InputError, match="not LoRA-FA's for this adapter"):
        optimizer.load_state_dict({})


@pytest.mark.parametrize(
    ("config", "options", "message"),
    [
        (IA3Config(target_modules=["query"]), {"loraplus_lr_ratio": 2.0}, "no LoRA adapter is trained"),
        (IA3Config(target_modules=["query"]), {"optim": "lorafa"}, "no LoRA adapter is trained"),
        (LoraConfig(target_modules=["words"]), {"optim": "lorafa"}, r"not for .*words' \(LoraEmbedding\)"),
        (LoraConfig(use_dora=True), {"optim": "lorafa"}, r"\(DoraLinear\)"),
        (LoraConfig(lora_bias=True), {"optim": "lorafa"}, "without lora_bias"),
    ],
    ids=str,
)
def test_refuses_adapters(twins, config, options, message):
    if isinstance(config, IA3Config):
        config.feedforward_modules = set()
    with pytest.raises(InputError, match=message):
        make_optimizer(get_peft_model(twins.make_model(), config), arguments(**options))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"optim": "lora_fa"}, "optim must be one of adamw, lorafa, not 'lora_fa'; did you mean 'lorafa'"),
        ({"loraplus_lr_ratio": 0}, "loraplus_lr_ratio must be greater than 0, not 0"),
        ({"loraplus_lr_embedding": -1.0}, "loraplus_lr_embedding must be greater than 0"),
        ({"optim": "lorafa", "loraplus_lr_ratio": 2.0}, "loraplus_lr_ratio is for optim=adamw"),
    ],
)
def test_refuses_arguments(options, message):
    with pytest.raises(InputError, match=message):
        arguments(**options)


def test_a_recipe_asks_for_them(tmp_path):
    (tmp_path / "recipe.yaml").write_text("model: {path: bert}\ndata: {train: x.csv}\n")
    recipe = load_recipe(tmp_path / "recipe.yaml", ["train.loraplus_lr_ratio=16"])
    assert recipe.training_arguments().loraplus_lr_ratio == 16
    recipe = load_recipe(tmp_path / "recipe.yaml", ["train.optim=lorafa"])
    assert recipe.training_arguments().optim == "lorafa"
    with pytest.raises(InputError, match="did you mean"):
        load_recipe(tmp_path / "recipe.yaml", ["train.loraplus_ratio=16"])
