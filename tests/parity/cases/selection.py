"""Methods that train, or replace, a part of the base model's own parameters.

PEFT has LN tuning and trainable tokens; for the others plain torch, with the same parameters trained, is the
oracle: it reads a file as a patch of the model's state.
"""

from tests.parity.case import Case
from tests.parity.oracles import DiffOracle, TorchOracle

_LAST_LAYER = {"freeze_layers": 1, "exclude_modules": ["embeddings"]}
_GATES = {"alpha_init": 0.3, "temperature": 0.7, "gamma": -1.4, "zeta": 1.3, "l0_weight": 1e-3}

CASES = [
    Case("LN tuning", "LNTuningConfig", {"target_modules": ["LayerNorm"]}, rate=1e-2),
    Case(
        "trainable tokens",
        "TrainableTokensConfig",
        {"token_indices": list(range(4, 40))},
        heads=("sequence",),
        rate=1e-2,
        why={
            "heads": "PEFT fails to put trainable tokens into a token classifier, and its file of a masked "
            "language model lacks the bias of the tied output."
        },
    ),
    Case(
        "LoRA and trainable tokens",
        "LoraConfig",
        {"r": 4, "target_modules": ["query"], "trainable_token_indices": list(range(30, 50))},
        heads=("sequence", "token"),
        why={"heads": "PEFT's file of trainable tokens lacks the bias of a masked language model's output."},
    ),
    Case(
        "BitFit", "BitFitConfig", {}, oracle=TorchOracle, trains=lambda name: name.endswith("bias"), rate=1e-2
    ),
    Case(
        "layer freezing",
        "LayerFreezingConfig",
        _LAST_LAYER,
        oracle=TorchOracle,
        trains=lambda name: "layer.0." not in name and "embeddings." not in name,
    ),
    Case("full fine-tuning", "FullConfig", {}, oracle=TorchOracle, trains=lambda name: True, rate=1e-3),
    Case(
        "diff pruning",
        "DiffPruningConfig",
        {"target_modules": ["query", "value"], **_GATES},
        oracle=DiffOracle,
        in_file_as_trained=False,
        rate=1e-2,
    ),
]
