"""List the operators of the graphs compiled for an accelerator, with the devices MindSpore documents.

    python scripts/operators.py > docs/operators.md

Compiles, on the CPU, the training step and the inference graph of a small BERT with every method (with LoRA,
every task head), the compositions for accelerators chosen, and reads the operators' names from MindSpore's
own dump.
"""

from __future__ import annotations

import os
import re
import sys
import tempfile
from pathlib import Path

import mindspore as ms
import numpy as np
from mindspore import ops

import mindpeft.ops.device as device

device.on_cpu = lambda: False  # before the compositions are imported, so that each takes its accelerator form

from mindpeft import LoraConfig, PeftConfig, get_peft_model  # noqa: E402
from mindpeft.config import supported_methods  # noqa: E402
from mindpeft.models.bert import HEADS, BertConfig  # noqa: E402
from mindpeft.train.optim import AdamW  # noqa: E402
from mindpeft.train.step import EvalStep, TrainStep  # noqa: E402

# Names inside the graph -> the documented operator they are a form of.
FORMS = {
    "SumExt": "sum",
    "Muls": "mul",
    "PowTensorScalar": "pow",
    "ClampScalar": "clamp",
    "GatherD": "gather_elements",
    "Concat": "cat",
    "LessScalar": "less",
    "SoftmaxBackward": "softmax",
    "ZerosLikeExt": "zeros_like",
    "Div": "div",
    "IsFinite": "isfinite",
    "LayerNorm": "LayerNorm",
    "IFFT2": "ifft2",
    "MatMulExt": "matmul",
    "ReLU": "relu",
    "SplitWithSize": "split",
}
LABELS = {
    "AutoModelForSequenceClassification": (2,),
    "AutoModelForTokenClassification": (2, 8),
    "AutoModelForQuestionAnswering": (2, 2),
    "AutoModelForMaskedLM": (2, 8),
}

BERT = BertConfig(
    vocab_size=50, hidden_size=128, num_hidden_layers=1, num_attention_heads=2, intermediate_size=128
)


def compile_graphs() -> None:
    """Compile LoRA's graphs for each task head, and every other method's for sequence classification."""
    lora = LoraConfig(r=4, lora_dropout=0.1, target_modules=["query", "dense", "word_embeddings"])
    for head in LABELS:
        compile_steps(head, lora)
    for method in supported_methods().values():
        variants = [method, *dict.fromkeys(method.PRESETS.values())]
        for config_class in variants:
            print(config_class.__name__, file=sys.stderr)
            config = config_class(task_type="SEQ_CLS", **config_class.EXAMPLE)
            compile_steps("AutoModelForSequenceClassification", config)


def compile_steps(head: str, config: PeftConfig) -> None:
    """Compile the training step and the inference graph of a small BERT with an adapter."""
    ids = ms.Tensor(np.ones((2, 8)), ms.int32)
    labels = ms.Tensor(np.zeros(LABELS[head]), ms.int32)
    model = get_peft_model(HEADS[head].from_config(BERT), config)
    model.set_train()
    optimizer = AdamW(model, weight_decay=0.1)
    columns = ("input_ids", "attention_mask", "labels")
    step = TrainStep(model, columns, optimizer, accumulation_steps=2, hooks=model.training_hooks())
    step(ms.Tensor(True), ms.Tensor(1.0, ms.float32), *optimizer.scalars(1, 1e-3), ids, ids, labels)
    model.set_train(False)
    EvalStep(model, columns)(ids, ids, labels)


def operators_in(folder: Path) -> list[str]:
    """Return the names of the operators in the dumped, validated graphs."""
    names: set[str] = set()
    for path in folder.glob("*_validate_*.ir"):
        text = path.read_text()
        names.update(re.findall(r"= (?:\$\([^)]*\):)?(?:PrimFunc_)?([A-Z]\w*)\(", text))
    bookkeeping = {
        "Load",
        "UpdateState",
        "MakeTuple",
        "TupleGetItem",
        "Depend",
        "Return",
        "Partial",
        "Switch",
    }
    return sorted(name for name in names - bookkeeping if not name.startswith("Func"))


def documented(name: str) -> tuple[str, str]:
    """Return the documented operator behind a name in the graph, and the devices its page states."""
    stem = re.sub(r"(Grad(V\d)?|Backward)$", "", name)
    snake = re.sub(r"(?<!^)(?=[A-Z])", "_", stem).lower()
    for public in (FORMS.get(name), FORMS.get(stem), snake, stem):
        platforms = re.search(
            r"Supported Platforms:\s*\n\s*(.+)", getattr(ops, public or "", None).__doc__ or ""
        )
        if platforms:
            devices = ", ".join(re.findall(r"``(\w+)``", platforms.group(1)))
            return f"ops.{public}" + (" (its gradient)" if stem != name else ""), devices
    return "-", "not documented"


def main() -> None:
    with tempfile.TemporaryDirectory() as scratch:
        ms.set_context(mode=ms.GRAPH_MODE, save_graphs=1, save_graphs_path=scratch)
        os.environ.setdefault("GLOG_v", "3")
        compile_graphs()
        names = operators_in(Path(scratch))
    if not names:
        sys.exit("MindSpore dumped no graphs")
    print(f"Operators in mindpeft's graphs for Ascend and GPU (MindSpore {ms.__version__}).\n")
    print("| in the graph | documented as | devices by MindSpore's documentation |\n|---|---|---|")
    for name in names:
        print(f"| {name} | {' | '.join(documented(name))} |")


if __name__ == "__main__":
    main()
