"""What is built on LoRA."""

from tests.parity.case import Case

_TARGETS = {"r": 4, "target_modules": ["query", "dense"]}

CASES = [
    Case("DoRA", "LoraConfig", {**_TARGETS, "use_dora": True}),
    Case("OLoRA", "LoraConfig", {**_TARGETS, "init_lora_weights": "olora"}),
    # torch's float32 decomposition, which PEFT uses, is off by some 1e-6 of the weights.
    Case("PiSSA", "LoraConfig", {**_TARGETS, "init_lora_weights": "pissa"}, tolerance=5e-5),
    Case(
        "LoRA on parameters",
        "LoraConfig",
        {"r": 4, "target_modules": [], "target_parameters": ["query.weight"]},
    ),
    Case("LoRA, orthogonal", "LoraConfig", {**_TARGETS, "init_lora_weights": "orthogonal"}),
]
