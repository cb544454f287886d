"""Methods that add virtual positions.

Of P-tuning and of prefixes with a projection PEFT writes the encoder's output alone, so that a reader trains
other tensors; multitask prompts need an argument of their own: tests/tuners compares those with PEFT. It has
no class for a masked language model with such a method.
"""

from tests.parity.case import Case

NAMES = {"prompt_encoder.embedding.weight": "prompt_embeddings"}
HEADS = ("sequence", "token")

CASES = [
    Case(
        "prompt tuning",
        "PromptTuningConfig",
        {"num_virtual_tokens": 5},
        merges=False,
        names=NAMES,
        heads=HEADS,
        rate=1e-2,
    ),
    Case(
        "prefix tuning, P-tuning v2",
        "PrefixTuningConfig",
        {"num_virtual_tokens": 5},
        merges=False,
        names=NAMES,
        heads=HEADS,
        rate=1e-2,
    ),
]
