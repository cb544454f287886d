"""What is built on LoRA."""

from tests.parity.case import Case
from tests.parity.oracles import AdaLoraOracle

_TARGETS = {"r": 4, "target_modules": ["query", "dense"]}
_SCHEDULE = {"total_step": 20, "tinit": 3, "tfinal": 6, "init_r": 4, "target_r": 2, "orth_reg_weight": 0.3}

CASES = [
    Case("DoRA", "LoraConfig", {**_TARGETS, "use_dora": True}),
    Case("OLoRA", "LoraConfig", {**_TARGETS, "init_lora_weights": "olora"}, same_graph=True),
    # torch's float32 decomposition, which PEFT uses, is off by some 1e-6 of the weights.
    Case(
        "LoRA on parameters",
        "LoraConfig",
        {"r": 4, "target_modules": [], "target_parameters": ["query.weight"]},
    ),
    # PEFT decomposes in float32: the base's rest is off by 1e-6 where singular values lie close together.
    Case("PiSSA", "LoraConfig", {**_TARGETS, "init_lora_weights": "pissa"}, tolerance=5e-5, same_graph=True),
    Case("LoRA, orthogonal", "LoraConfig", {**_TARGETS, "init_lora_weights": "orthogonal"}, same_graph=True),
    Case(
        "AdaLoRA",
        "AdaLoraConfig",
        {**_SCHEDULE, "lora_alpha": 32, "target_modules": ["query", "value"]},
        oracle=AdaLoraOracle,
        rate=1e-2,
    ),
]
