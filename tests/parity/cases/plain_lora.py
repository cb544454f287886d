"""Ordinary LoRA."""

from tests.parity.case import Case

CASES = [
    Case("LoRA", "LoraConfig", {"r": 4, "lora_alpha": 8, "target_modules": ["query", "value"]}),
    Case(
        "rsLoRA",
        "LoraConfig",
        {"r": 4, "use_rslora": True, "target_modules": ["query", "dense"]},
        same_graph=True,
    ),
    Case(
        "LoRA on embeddings",
        "LoraConfig",
        {"r": 4, "target_modules": ["word_embeddings", "key"]},
        heads=("sequence", "token"),
        why={
            "heads": "A masked language model's output is tied to the embeddings; merging would change both."
        },
    ),
    Case(
        "LoRA with biases and a saved module",
        "LoraConfig",
        {
            "r": 4,
            "lora_bias": True,
            "bias": "lora_only",
            "target_modules": ["query", "value"],
            "rank_pattern": {"value": 2},
            "modules_to_save": ["LayerNorm"],
        },
    ),
]
