"""Ordinary LoRA."""

from tests.parity.case import Case

CASES = [
    Case("LoRA", "LoraConfig", {"r": 4, "lora_alpha": 8, "target_modules": ["query", "value"]}),
    Case("rsLoRA", "LoraConfig", {"r": 4, "use_rslora": True, "target_modules": ["query", "dense"]}),
    Case(
        "LoRA on embeddings",
        "LoraConfig",
        {"r": 4, "target_modules": ["word_embeddings", "key"]},
        heads=("sequence", "token"),  # a masked LM's decoder is tied to them, and merging would change it
    ),
]
