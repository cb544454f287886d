"""Every method on SST-2 with MiniLM: test accuracy, trainable share, step time, peak memory.

    python scripts/bench/methods.py SST2_FOLDER                    # all, into the table of the READMEs
    python scripts/bench/methods.py SST2_FOLDER --only LoRA BitFit # measure these rows again

The folder holds train.tsv and test.tsv, lines "text<TAB>label" without a header. Each method trains 100 steps
by ``scripts/recipes/methods.yaml`` in a process of its own, so that peak memory is its own; learning rates
are those of the table below, common ones of the methods' papers, not tuned here.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import yaml
from tables import ROOT, write_rows

RECIPE = ROOT / "scripts" / "recipes" / "methods.yaml"
# File -> the heads of the table's columns.
DOCUMENTS = {
    "README.md": "| method | accuracy, % | trained numbers | share, % | median step, ms | peak memory, MiB |",
    "README_zh.md": "| 方法 | 测试准确率 % | 可训练参数 | 占比 % | 每步中位耗时 ms | 峰值内存 MiB |",
}

QUERY_VALUE = ["query", "value"]
WORDS = ["word_embeddings"]
HEAD_ONLY = {"method": "full", "target_modules": ["classifier"]}
# Name -> (peft section, learning rate). The ends first: the head alone, and everything.
METHODS: dict[str, tuple[Any, float]] = {
    "head only": (HEAD_ONLY, 1e-2),
    "full fine-tuning": ({"method": "full"}, 5e-5),
    "last 2 layers": ({"method": "freeze", "freeze_layers": 4}, 1e-4),
    "BitFit": ({"method": "bitfit"}, 2e-3),
    "LN tuning": ({"method": "ln_tuning", "target_modules": ["LayerNorm"]}, 2e-3),
    "LoRA": ({"method": "lora", "r": 8, "lora_alpha": 16, "target_modules": QUERY_VALUE}, 2e-3),
    "LoRA, all linear": ({"method": "lora", "r": 8, "lora_alpha": 16, "target_modules": "all-linear"}, 1e-3),
    "DoRA": (
        {"method": "lora", "r": 8, "lora_alpha": 16, "use_dora": True, "target_modules": QUERY_VALUE},
        2e-3,
    ),
    "AdaLoRA": ({"method": "adalora", "init_r": 12, "target_r": 8, "target_modules": QUERY_VALUE}, 2e-3),
    "VeRA": ({"method": "vera", "r": 256, "target_modules": QUERY_VALUE}, 1e-2),
    "LoHa": ({"method": "loha", "r": 8, "alpha": 16, "target_modules": QUERY_VALUE}, 2e-3),
    "LoKr": ({"method": "lokr", "r": 8, "alpha": 16, "target_modules": QUERY_VALUE}, 2e-3),
    "(IA)3": ({"method": "ia3"}, 1e-2),
    "OFT": ({"method": "oft", "target_modules": QUERY_VALUE}, 1e-3),
    "BOFT": ({"method": "boft", "target_modules": QUERY_VALUE}, 1e-3),
    "HRA": ({"method": "hra", "target_modules": QUERY_VALUE}, 1e-3),
    "MiSS": ({"method": "miss", "r": 16, "target_modules": QUERY_VALUE}, 2e-3),
    "RoAd": ({"method": "road", "group_size": 64, "target_modules": QUERY_VALUE}, 1e-2),
    "BEFT": ({"method": "beft", "target_modules": ["value"]}, 1e-2),
    "C3A": ({"method": "c3a", "block_size": 64, "target_modules": QUERY_VALUE}, 1e-1),
    "DeLoRA": ({"method": "delora", "r": 8, "target_modules": QUERY_VALUE}, 5e-3),
    "GraLoRA": ({"method": "gralora", "r": 8, "alpha": 16, "target_modules": QUERY_VALUE}, 2e-3),
    "RandLoRA": ({"method": "randlora", "target_modules": QUERY_VALUE}, 1e-3),
    "SHiRA": ({"method": "shira", "r": 8, "target_modules": QUERY_VALUE}, 5e-3),
    "VB-LoRA": ({"method": "vblora", "vector_length": 64, "target_modules": QUERY_VALUE}, 1e-2),
    "WaveFT": ({"method": "waveft", "n_frequency": 1000, "target_modules": QUERY_VALUE}, 1e-2),
    "FourierFT": ({"method": "fourierft", "n_frequency": 1000, "target_modules": QUERY_VALUE}, 1e-2),
    "Houlsby": ({"method": "bottleneck", "preset": "double_seq_bn"}, 1e-3),
    "Pfeiffer": ({"method": "bottleneck", "preset": "seq_bn"}, 1e-3),
    "parallel adapter": ({"method": "bottleneck", "preset": "par_bn"}, 1e-3),
    "scaled parallel adapter": ({"method": "bottleneck", "preset": "scaled_par_bn"}, 1e-3),
    "AdapterPlus": ({"method": "bottleneck", "preset": "adapter_plus"}, 1e-3),
    "Compacter": ({"method": "bottleneck", "preset": "compacter"}, 3e-3),
    "prompt tuning": ({"method": "prompt_tuning", "num_virtual_tokens": 20}, 1e-2),
    "P-tuning": ({"method": "p_tuning", "num_virtual_tokens": 20, "encoder_hidden_size": 128}, 3e-3),
    "prefix tuning": ({"method": "prefix_tuning", "num_virtual_tokens": 20}, 1e-2),
    "trainable tokens": (
        {"method": "trainable_tokens", "token_indices": list(range(999, 5000)), "target_modules": WORDS},
        1e-2,
    ),
    "DiffPruning": ({"method": "diff_pruning", "target_modules": QUERY_VALUE}, 1e-3),
    "MAM": ({"preset": "mam"}, 1e-3),
    "UniPELT": ({"preset": "unipelt"}, 1e-3),
    "LoRA + BitFit": (
        [{"method": "lora", "r": 8, "lora_alpha": 16, "target_modules": QUERY_VALUE}, {"method": "bitfit"}],
        2e-3,
    ),
}


def run(name: str, data: Path) -> dict[str, float]:
    """Train with one method and return what was measured."""
    section, rate = METHODS[name]
    if name == "AdaLoRA":
        steps = yaml.safe_load(RECIPE.read_text(encoding="utf-8"))["train"]["max_steps"]
        section = {**section, "total_step": steps, "tinit": 20, "tfinal": 30, "deltaT": 5}
    with tempfile.TemporaryDirectory() as scratch:
        command = [sys.executable, "-m", "mindpeft", "train", str(RECIPE), f"peft={json.dumps(section)}"]
        command += [f"train.learning_rate={rate}", f"output_dir={scratch}/run"]
        command += [f"data.{part}={data / f'{part}.tsv'}" for part in ("train", "test")]
        environment = {**os.environ, "OMP_NUM_THREADS": "2", "OMP_WAIT_POLICY": "passive"}
        subprocess.run(command, check=True, stdout=sys.stderr, env=environment)
        metrics = json.loads(Path(scratch, "run", "metrics.json").read_text())
    train = metrics["train"]
    return {
        "accuracy": 100 * metrics["test"]["test_accuracy"],
        "trainable": train["trainable_parameters"],
        "share": 100 * train["trainable_parameters"] / train["total_parameters"],
        "step": 1000 * train["median_step_seconds"],
        "memory": train["peak_memory_bytes"] / 2**20,
    }


def row(name: str, found: dict[str, float]) -> str:
    """A line of the table."""
    return (
        f"| {name} | {found['accuracy']:.1f} | {found['trainable']:,} | {found['share']:.2f} | "
        f"{found['step']:.0f} | {found['memory']:,.0f} |"
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--only", nargs="+", choices=list(METHODS), metavar="METHOD")
    arguments = parser.parse_args()
    print(DOCUMENTS["README.md"])
    for name in arguments.only or METHODS:
        line = row(name, run(name, arguments.folder.resolve()))
        print(line, flush=True)
        for document, head in DOCUMENTS.items():
            write_rows(document, Path(__file__).name, head, {name: line}, METHODS)


if __name__ == "__main__":
    main()
