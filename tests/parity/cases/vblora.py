"""VB-LoRA."""

from tests.parity.case import Case

_FIRST = "bert.encoder.layer.0.attention.self.query"  # both find the bank at the first layer that shares it

CASES = [
    Case(
        "VB-LoRA",
        "VBLoRAConfig",
        {
            "target_modules": ["query", "value", "dense"],
            "num_vectors": 12,
            "vector_length": 8,
            "init_vector_bank_bound": 0.2,
            "init_logits_std": 1.0,
        },
        names={f"{_FIRST}.vblora_vector_bank": f"{_FIRST}.shared.vblora_vector_bank"},
        rate=5e-3,
    )
]
