"""LoRA in MindSpore ``.ckpt`` files, of MindPet, mindformers and PyNative training.

Tensors are ``<path>.mindpet_delta_lora_a``/``_b``, ``<path>.lora_A.weight``/``lora_B.weight`` or
``<path>.lora_a``/``lora_b``; the file knows neither alpha nor Hugging Face's names, so the alpha is asked for
and the paths of Llama-shaped models are translated.
"""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np

from mindpeft.adapter_files import check_floats, shortened
from mindpeft.convert.checkpoint import open_checkpoint
from mindpeft.errors import InputError
from mindpeft.foreign.lora import LoraUpdate, pair_up
from mindpeft.tuners.targeted import check_number

_LEAF = re.compile(r"^(?P<path>.+)\.(?:mindpet_delta_lora_|lora_)(?P<side>[abAB])(?:\.weight)?$")
# mindformers' names of a Llama layer's cells -> Hugging Face's.
_HF_NAMES = {
    "attention.wq": "self_attn.q_proj",
    "attention.wk": "self_attn.k_proj",
    "attention.wv": "self_attn.v_proj",
    "attention.wo": "self_attn.o_proj",
    "feed_forward.w1": "mlp.gate_proj",
    "feed_forward.w2": "mlp.down_proj",
    "feed_forward.w3": "mlp.up_proj",
}
_FUSED = ("attention.w_qkv", "attention.w", "feed_forward.w_gate_hidden")
_OPTIMIZER = ("adam_m.", "adam_v.", "moment1.", "moment2.", "moments.", "accu_grads.")


def read_mindformers(path: Path, alpha: float | None) -> dict[str, LoraUpdate]:
    """Read the LoRA tensors of a ``.ckpt``; base weights and optimizer state in it are left out.

    Args:
        path: the file.
        alpha: ``lora_alpha`` of the training run; the scaling is alpha / r.

    Raises:
        InputError: no alpha, no LoRA in the file, a fused matrix, or tensors that don't pair up.
    """
    found: dict[str, dict[str, np.ndarray]] = {}
    with open_checkpoint(path) as tensors:
        for name in tensors:
            match = _LEAF.match(name)
            if match and not name.startswith(_OPTIMIZER):
                side, sides = match["side"].lower(), found.setdefault(match["path"], {})
                if side in sides:
                    raise InputError(f"{path} has two tensors {side.upper()} of LoRA at {match['path']!r}")
                check_floats(tensors, [name])
                sides[side] = tensors[name].numpy()
    if not found:
        raise InputError(f"{path} holds no LoRA tensors (mindpet_delta_lora_a, lora_A, lora_a)")
    if alpha is None:
        raise InputError(f"{path} does not say what lora_alpha was: give it with --lora-alpha")
    check_number("lora_alpha", alpha)
    lonely = [name for name, sides in found.items() if sides.keys() != {"a", "b"}]
    if lonely:
        raise InputError(f"{path}: A without B, or B without A, at {shortened(lonely)}")
    updates = {}
    for name, sides in found.items():
        a, b = pair_up(sides["a"], sides["b"], name)
        updates[hugging_face_path(name)] = LoraUpdate(a, b, alpha / a.shape[0])
    return updates


def hugging_face_path(name: str) -> str:
    """The Hugging Face name of a cell.

    Raises:
        InputError: the cell fuses several matrices that Hugging Face keeps apart.
    """
    fused = next((part for part in _FUSED if name.endswith(f".{part}")), None)
    if fused:
        raise InputError(
            f"{name!r} fuses matrices that Hugging Face keeps apart: merge the adapter there instead"
        )
    for theirs, hugging_face in _HF_NAMES.items():
        if name.endswith(f".{theirs}"):
            return name.removesuffix(theirs) + hugging_face
    return name
