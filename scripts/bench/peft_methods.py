"""A training step of every method that Hugging Face PEFT has too: time and peak memory beside torch + peft.

    python scripts/bench/peft_methods.py                       # all, into the table of docs/benchmarks.md
    python scripts/bench/peft_methods.py --only LoRA DoRA      # measure these rows again

MiniLM with a classifier's head, batch 32 x 64, dropout 0, AdamW, clipping, the same config on both sides.
Each side runs in a process of its own, one for each method, and the two take turns. Both begin with the same
loss, but for methods whose fresh adapter changes the model by numbers drawn at random: those are marked.
Needs the test extra.
"""

from __future__ import annotations

import argparse
import importlib
import tempfile
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

from sides import alternate, serve
from tables import write_rows
from train_step import SHAPES, checkpoint, mindpeft_step, torch_step

SHAPE = SHAPES["minilm"]
DOCUMENT = "docs/benchmarks.md"
HEAD = (
    "| method | mindpeft, ms | torch + peft, ms | speed | mindpeft, GB | torch + peft, GB | memory "
    "| first losses |"
)
MARK = "*"

QUERY_VALUE = {"target_modules": ["query", "value"]}
TOKENS = {"num_virtual_tokens": 20}


class Method(NamedTuple):
    """A method of both packages.

    Attributes:
        config: the name of its config's class in both; None for full fine-tuning, which PEFT doesn't have.
        arguments: of the config.
        random: whether a fresh adapter changes the model by random numbers.
    """

    config: str | None
    arguments: Mapping[str, Any] = MappingProxyType({})
    random: bool = False


METHODS = {
    "full fine-tuning": Method(None),
    "LN tuning": Method("LNTuningConfig", {"target_modules": ["LayerNorm"]}),
    "LoRA": Method("LoraConfig", {"r": 8, "lora_alpha": 16, **QUERY_VALUE}),
    "LoRA, all linear": Method("LoraConfig", {"r": 8, "lora_alpha": 16, "target_modules": "all-linear"}),
    "DoRA": Method("LoraConfig", {"r": 8, "lora_alpha": 16, "use_dora": True, **QUERY_VALUE}),
    "AdaLoRA": Method(
        "AdaLoraConfig",
        {"init_r": 12, "target_r": 8, "total_step": 1000, "tinit": 200, **QUERY_VALUE},
        random=True,  # the term that keeps A orthogonal
    ),
    "VeRA": Method("VeraConfig", {"r": 256, **QUERY_VALUE}),
    "LoHa": Method("LoHaConfig", {"r": 8, "alpha": 16, **QUERY_VALUE}),
    "LoKr": Method("LoKrConfig", {"r": 8, "alpha": 16, **QUERY_VALUE}),
    "(IA)3": Method(
        "IA3Config",
        {"target_modules": ["key", "value", "output.dense"], "feedforward_modules": ["output.dense"]},
    ),
    "OFT": Method("OFTConfig", QUERY_VALUE),
    "BOFT": Method("BOFTConfig", QUERY_VALUE),
    "HRA": Method("HRAConfig", QUERY_VALUE),
    "MiSS": Method("MissConfig", {"r": 16, **QUERY_VALUE}),
    "RoAd": Method("RoadConfig", {"group_size": 64, **QUERY_VALUE}),
    "BEFT": Method("BeftConfig", {"target_modules": ["value"]}),
    "C3A": Method("C3AConfig", {"block_size": 64, "init_weights": True, **QUERY_VALUE}),
    "DeLoRA": Method("DeloraConfig", {"r": 8, **QUERY_VALUE}),
    "GraLoRA": Method("GraloraConfig", {"r": 8, "alpha": 16, **QUERY_VALUE}),
    "RandLoRA": Method("RandLoraConfig", QUERY_VALUE),
    "SHiRA": Method("ShiraConfig", {"r": 8, **QUERY_VALUE}),
    "VB-LoRA": Method("VBLoRAConfig", {"vector_length": 64, **QUERY_VALUE}, random=True),
    "WaveFT": Method("WaveFTConfig", {"n_frequency": 1000, **QUERY_VALUE}),
    "FourierFT": Method("FourierFTConfig", {"n_frequency": 1000, "init_weights": True, **QUERY_VALUE}),
    "prompt tuning": Method("PromptTuningConfig", TOKENS, random=True),
    "P-tuning": Method("PromptEncoderConfig", {"encoder_hidden_size": 128, **TOKENS}, random=True),
    "prefix tuning": Method("PrefixTuningConfig", TOKENS, random=True),
    "multitask prompt tuning": Method("MultitaskPromptTuningConfig", {"num_tasks": 2, **TOKENS}, random=True),
    "trainable tokens": Method(
        "TrainableTokensConfig",
        {"token_indices": list(range(999, 5000)), "target_modules": ["word_embeddings"]},
    ),
}


def adapted(model: Any, package: str, method: Method) -> Any:
    """The model of one side with a fresh adapter.

    Args:
        model: of transformers or of mindpeft.
        package: "peft" or "mindpeft".
        method: a value of ``METHODS``.
    """
    if method.config is None and package == "peft":
        return model
    home = importlib.import_module(package)
    config = getattr(home, method.config or "FullConfig")
    return home.get_peft_model(model, config(task_type="SEQ_CLS", **method.arguments))


def side(package: str, name: str, folder: str) -> None:
    """Run one side of one method."""
    make, method = {"mindpeft": mindpeft_step, "peft": torch_step}[package], METHODS[name]
    shape = SHAPE._replace(tasks=method.arguments.get("num_tasks", 0))
    serve(lambda: make(folder, shape, lambda model: adapted(model, package, method)))


def with_head(scratch: str) -> str:
    """Write MiniLM with the head that both sides begin with, and return its folder."""
    import torch
    import transformers

    torch.manual_seed(0)
    auto = transformers.AutoModelForSequenceClassification
    auto.from_pretrained(checkpoint(SHAPE, Path(scratch))).save_pretrained(scratch)
    return scratch


def compare(name: str, folder: str, steps: int, threads: int) -> tuple[dict, dict]:
    """Measure one method: the figures of mindpeft and of torch + peft."""
    common = ["--folder", folder, "--only", name]
    commands = [[__file__, "--side", package, *common] for package in ("mindpeft", "peft")]
    return alternate(*commands, steps, threads)


def row(name: str, ours: dict[str, float], peer: dict[str, float]) -> str:
    """A line of the table."""
    mark, speed = MARK if METHODS[name].random else "", peer["step"] / ours["step"]
    return (
        f"| {name} | {1000 * ours['step']:.0f} | {1000 * peer['step']:.0f} | {speed:.2f} "
        f"| {ours['memory']:.2f} | {peer['memory']:.2f} | {ours['memory'] / peer['memory']:.2f} "
        f"| {ours['first_loss']:.5f}, {peer['first_loss']:.5f}{mark} |"
    )


def remarks(ours: dict[str, float], peer: dict[str, float]) -> str:
    """What is printed beside a line: processors' time tells more than the clock where others work too."""
    return (
        f"CPU {1000 * ours['cpu']:.0f} and {1000 * peer['cpu']:.0f} ms, {peer['cpu'] / ours['cpu']:.2f}; "
        f"before any step {ours['memory_before']:.2f} and {peer['memory_before']:.2f} GB"
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", nargs="+", choices=list(METHODS), metavar="METHOD")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--side", choices=["mindpeft", "peft"], help=argparse.SUPPRESS)
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.side:
        side(arguments.side, arguments.only[0], arguments.folder)
        return
    print(HEAD)
    with tempfile.TemporaryDirectory() as scratch:
        folder = with_head(scratch)
        for name in arguments.only or METHODS:
            ours, peer = compare(name, folder, arguments.steps, arguments.threads)
            line = row(name, ours, peer)
            print(line, remarks(ours, peer), flush=True)
            write_rows(DOCUMENT, Path(__file__).name, HEAD, {name: line}, METHODS)


if __name__ == "__main__":
    main()
