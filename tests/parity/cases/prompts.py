"""Methods that add virtual positions.

Of networks that make them (P-tuning, prefixes with a projection) PEFT writes the output alone, so that
training is compared from values handed over in memory. PEFT has no class for a masked language model with
such a method; the one for feature extraction does the same without token types.
"""

import numpy as np

from tests.parity.case import Case

_NAMES = {"prompt_encoder.embedding.weight": "prompt_embeddings"}
_TASKS = ("prefix_task_cols", "prefix_task_rows")
_WHY = {"merge": "Virtual positions are no change of weights."}


def of_each_layer(tensors):
    """PEFT's tensors of a projected prefix by our names: its last layer is cut into one for each layer."""
    width, named = tensors["prompt_encoder.embedding.weight"].shape[1], {}
    for name, value in tensors.items():
        if name.startswith("prompt_encoder.transform.2"):
            for layer, part in enumerate(value.split(2 * width)):
                named[f"prompt_encoder.layers.{layer}.{name.rpartition('.')[2]}"] = part
        else:
            named[name.replace("transform.0", "first")] = value
    return named


def case(name, config, options, **more):
    """A case of such a method."""
    virtual = {"merges": False, "virtual": True, "rate": 1e-2, "why": _WHY}
    return Case(name, config, {"num_virtual_tokens": 5, **options}, **{**virtual, **more})


CASES = [
    case("prompt tuning", "PromptTuningConfig", {}, names=_NAMES),
    case("prefix tuning, P-tuning v2", "PrefixTuningConfig", {}, names=_NAMES),
    case(
        "prefix tuning with a projection",
        "PrefixTuningConfig",
        {"prefix_projection": True, "encoder_hidden_size": 20},
        names=of_each_layer,
        in_file_as_trained=False,
        rate=2e-3,
    ),
    case("P-tuning, MLP", "PromptEncoderConfig", {"encoder_hidden_size": 20}, in_file_as_trained=False),
    case(
        "P-tuning, LSTM",
        "PromptEncoderConfig",
        {"encoder_reparameterization_type": "LSTM", "encoder_hidden_size": 10},
        in_file_as_trained=False,
    ),
    case(
        "multitask prompt tuning",
        "MultitaskPromptTuningConfig",
        {"num_ranks": 2, "num_tasks": 3},
        names={**_NAMES, **{f"prompt_encoder.{name}": name for name in _TASKS}},
        columns={"task_ids": np.array([2, 0, 2], np.int32)},
        heads=("sequence", "token"),
        why={**_WHY, "heads": "PEFT's class for feature extraction does not pass `task_ids` on."},
    ),
]
