"""DeLoRA."""

from tests.parity.case import Case

CASES = [
    Case(
        "DeLoRA",
        "DeloraConfig",
        # Directions of tiny vectors turn fast: from a B of zeros rounding errors soon make two curves.
        {
            "target_modules": ["query", "value", "dense"],
            "r": 4,
            "delora_lambda": 1.0,
            "init_weights": False,
        },
        rate=2e-3,
    ),
]
