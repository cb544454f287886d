"""Methods that train, or replace, a part of the base model's own parameters."""

from tests.parity.case import Case

CASES = [
    Case("LN tuning", "LNTuningConfig", {"target_modules": ["LayerNorm"]}, rate=1e-2),
    # PEFT can't put it into a token classifier, and leaves out the bias of a masked LM's tied output.
    Case(
        "trainable tokens",
        "TrainableTokensConfig",
        {"token_indices": list(range(4, 40))},
        heads=("sequence",),
        rate=1e-2,
    ),
    Case(
        "LoRA and trainable tokens",
        "LoraConfig",
        {"r": 4, "target_modules": ["query"], "trainable_token_indices": list(range(30, 50))},
        heads=("sequence", "token"),
    ),
]
