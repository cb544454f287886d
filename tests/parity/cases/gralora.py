"""GraLoRA."""

from tests.parity.case import Case

CASES = [
    Case(
        "GraLoRA",
        "GraloraConfig",
        {"target_modules": ["query", "value", "dense"], "r": 4, "alpha": 8, "hybrid_r": 2},
    )
]
