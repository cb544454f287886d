"""RandLoRA."""

from tests.parity.case import Case

CASES = [
    Case(
        "RandLoRA",
        "RandLoraConfig",
        {"target_modules": ["query", "value", "dense"], "r": 8, "randlora_alpha": 16},
        rate=1e-2,
    )
]
