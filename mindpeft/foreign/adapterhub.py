"""LoRA, (IA)3, prefixes and unions of methods in folders of AdapterHub's `adapters` library.

<cell>.loras.NAME.lora_A / lora_B              LoRA, or the factors of (IA)3 in lora_B alone
<cell>.loras.NAME.gate.weight / bias           its gate
<attention>.prefix_tuning.pool.prefix_tunings.NAME.self_prefix...      one prefix for all layers, under each
<attention>.prefix_tuning.prefix_gates.NAME.weight / bias              a layer's gates

LoRA and (IA)3 are those of Hugging Face PEFT. Gated LoRA is no method of PEFT's, and its prefixes are others:
it moves the real tokens' positions behind them. Both become methods of ours.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import mindspore as ms
import numpy as np

from mindpeft.adapter_files import shortened, write_adapter
from mindpeft.config import PeftConfig
from mindpeft.errors import InputError
from mindpeft.foreign.lora import LoraUpdate, lora_adapter
from mindpeft.tuners import gated_lora, hub_prefix
from mindpeft.tuners.adapterhub_files import WEIGHT_NAMES, read_bottleneck, read_content
from mindpeft.tuners.adapterhub_names import base_keys, read_head, read_weights
from mindpeft.tuners.base import Tensors
from mindpeft.tuners.bottleneck_layers import NON_LINEARITIES
from mindpeft.tuners.gated_lora import GatedLoraConfig
from mindpeft.tuners.hub_prefix import HubPrefixConfig
from mindpeft.tuners.ia3 import IA3Config
from mindpeft.tuners.lora_layers import LoraLinear
from mindpeft.tuners.prompt_learning import OUTPUT
from mindpeft.tuners.targeted import check_choice, check_count, check_number

Part = tuple[PeftConfig, Tensors]
_LORA = re.compile(r"(?P<path>.+)\.loras\.(?P<name>[^.]+)\.(?P<leaf>lora_[AB]|gate\.(?:weight|bias))")
_PREFIX = re.compile(
    r"(?:.+\.)?prefix_tuning\.(?:pool\.)?prefix_tunings\.(?P<name>[^.]+)\.(?P<kind>[^.]+)\.(?P<leaf>.+)"
)
_PREFIX_GATE = re.compile(
    r"(?P<path>.+)\.prefix_tuning\.prefix_gates\.(?P<name>[^.]+)\.(?P<leaf>weight|bias)"
)

logger = logging.getLogger(__name__)


def import_adapter(source: Path, folder: Path, prefix: str = "") -> None:
    """Turn a folder that the library wrote, of whatever method, into one that mindpeft reads.

    Args:
        source: holds ``adapter_config.json`` and the weights.
        folder: made if absent; a union of methods becomes a hybrid.
        prefix: put before the cells' names.

    Raises:
        InputError: files are missing or damaged, or the method has no equal here.
    """
    content = read_content(source)
    try:
        weights = read_weights(source, WEIGHT_NAMES)
        parts = [_part(keys, own, content, prefix) for keys, own in _shares(content["config"], weights)]
    except InputError as error:
        raise InputError(f"{source}: {error}") from error
    head = read_head(source)
    if head:
        parts[-1][0].modules_to_save = sorted({name.rpartition(".")[0] for name in head})
    parts[-1][1].update(head)
    write_adapter(folder, [(config, _prefixed(config, tensors)) for config, tensors in parts])


def _prefixed(config: PeftConfig, tensors: Tensors) -> Tensors:
    return {config.CELL_PREFIX + name: value for name, value in tensors.items()}


def _shares(config: Mapping[str, Any], weights: Tensors) -> list[tuple[Mapping[str, Any], Tensors]]:
    """The configs in a config, each with the weights that are its own."""
    if config.get("architecture") != "union":
        return [(config, weights)]
    configs = config.get("configs")
    if not isinstance(configs, list) or not configs or not all(isinstance(c, dict) for c in configs):
        raise InputError("a union must have configs, a list of objects")
    kinds = [found.get("architecture") for found in configs]
    if not all(isinstance(kind, str | None) for kind in kinds):
        raise InputError(f"the architectures of a union must be text, not {kinds}")
    if len(set(kinds)) < len(kinds):
        raise InputError("a union of several adapters of one method can't be told apart by their tensors")
    taken = {
        "lora": {name for name in weights if _LORA.fullmatch(name)},
        "prefix_tuning": {
            name for name in weights if _PREFIX.fullmatch(name) or _PREFIX_GATE.fullmatch(name)
        },
    }
    taken[None] = weights.keys() - taken["lora"] - taken["prefix_tuning"]
    strange = set().union(*(names for kind, names in taken.items() if kind not in kinds))
    if strange:
        raise InputError(f"tensors of none of the union's methods: {shortened(sorted(strange))}")
    return [
        (c, {name: weights[name] for name in sorted(taken.get(c.get("architecture"), ()))}) for c in configs
    ]


def _part(keys: Mapping[str, Any], weights: Tensors, content: Mapping[str, Any], prefix: str) -> Part:
    """One method's config and tensors, by the names here without prefix."""
    kinds = {"lora": _lora, "prefix_tuning": _prefix}
    kind = keys.get("architecture")
    if kind is None:  # a bottleneck adapter
        return read_bottleneck({**content, "config": dict(keys)}, weights, prefix)
    if not isinstance(kind, str) or kind not in kinds:
        raise InputError(f"adapters of the architecture {kind!r} have no equal; lora and prefix_tuning have")
    return kinds[kind](keys, weights, base_keys(content), prefix)


def _lora(keys: Mapping[str, Any], weights: Tensors, about: Mapping[str, Any], prefix: str) -> Part:
    """LoRA, or (IA)3, which the library files under it."""
    if any(keys.get(key) is not None for key in ("vera_d", "vera_b")):
        raise InputError("VeRA of AdapterHub has no equal in PEFT: its vectors are full matrices there")
    mode, gated = keys.get("composition_mode", "add"), keys.get("use_gating", False)
    check_choice("composition_mode", mode, ("add", "scale"))
    check_choice("use_gating", gated, (True, False))
    check_number("alpha", keys.get("alpha"))
    check_count("r", keys.get("r"))
    cells: dict[str, Tensors] = {}
    for key, match in _matched(weights, _LORA).items():
        cells.setdefault(prefix + match["path"], {})[match["leaf"]] = weights[key]
    wanted = {"lora_B"} | ({"lora_A"} if mode == "add" else set())
    wanted |= {"gate.weight", "gate.bias"} if gated else set()
    for path, leaves in cells.items():
        if leaves.keys() != wanted:
            raise InputError(f"{path!r} has the tensors {shortened(sorted(leaves))}, but not those wanted")
        shapes = [leaves[name].shape for name in ("lora_B", "lora_A") if name in wanted]
        ranks = {shapes[0][-1], *(shape[0] for shape in shapes[1:])}
        if {len(shape) for shape in shapes} != {2} or ranks != {keys["r"]}:
            raise InputError(f"{path!r} has LoRA tensors {shapes}, not one matrix's of rank {keys['r']}")
    if mode == "scale":
        return _ia3(cells, keys, gated, about)
    if gated:
        return _gated(cells, keys, about)
    scaling = keys["alpha"] / keys["r"]
    updates = {path: LoraUpdate(own["lora_A"], own["lora_B"], scaling) for path, own in cells.items()}
    config, tensors = lora_adapter(updates, dropout=keys.get("dropout", 0.0))
    config.auto_mapping = about["auto_mapping"]
    config.base_model_name_or_path = about["base_model_name_or_path"]
    return config, tensors


def _ia3(
    cells: Mapping[str, Tensors], keys: Mapping[str, Any], gated: bool, about: Mapping[str, Any]
) -> Part:
    if gated or keys["r"] != 1:
        raise InputError("(IA)3 with use_gating, or with another r than 1, has no equal in PEFT")
    config = IA3Config(target_modules=sorted(cells), feedforward_modules=[], **about)
    alpha = np.float32(keys["alpha"])
    # Outputs are multiplied everywhere, that of the widening projection too.
    return config, {f"{path}.ia3_l": own["lora_B"] * alpha for path, own in cells.items()}


def _gated(cells: Mapping[str, Tensors], keys: Mapping[str, Any], about: Mapping[str, Any]) -> Part:
    logger.warning("LoRA with use_gating becomes GATED_LORA, which Hugging Face PEFT does not have")
    config = GatedLoraConfig(
        r=keys["r"], lora_dropout=keys.get("dropout", 0.0), target_modules=sorted(cells), **about
    )
    a, b = LoraLinear.NAMES
    names = {
        "lora_A": a,
        "lora_B": b,
        "gate.weight": gated_lora.GATE_WEIGHT,
        "gate.bias": gated_lora.GATE_BIAS,
    }
    return config, {f"{path}.{names[leaf]}": own[leaf] for path, own in cells.items() for leaf in own}


def _prefix(keys: Mapping[str, Any], weights: Tensors, about: Mapping[str, Any], prefix: str) -> Part:
    logger.warning(
        "a prefix of AdapterHub's becomes HUB_PREFIX: PREFIX_TUNING of Hugging Face PEFT moves the real "
        "tokens' positions behind it, so it can't be the same"
    )
    if keys.get("leave_out"):
        raise InputError("a prefix with leave_out has no equal here: prefixes are for all layers")
    if keys.get("dropout"):
        logger.warning("dropout on the prefix (%s) is left out; it acts while training only", keys["dropout"])
    gates = {key: match for key in weights if (match := _PREFIX_GATE.fullmatch(key))}
    found = _matched({key: value for key, value in weights.items() if key not in gates}, _PREFIX)
    kinds = {match["kind"] for match in found.values()}
    if kinds != {"self_prefix"}:
        raise InputError(f"only prefixes of self-attention are read, not {shortened(sorted(kinds))}")
    leaves = {match["leaf"]: weights[key] for key, match in found.items()}
    count = keys.get("prefix_length")
    check_count("prefix_length", count)
    values = _control(leaves, keys)
    if values.size % count:
        raise InputError(f"the prefix has {values.size} numbers, which are not those of {count} tokens")
    config = HubPrefixConfig(
        num_virtual_tokens=count,
        use_gating=keys.get("use_gating", False),
        shared_gating=keys.get("shared_gating", True),
        **about,
    )
    tensors = {OUTPUT: values.reshape(count, -1)}
    names = {"weight": hub_prefix.GATE_WEIGHT, "bias": hub_prefix.GATE_BIAS}
    for key, match in gates.items():
        tensors[f"{prefix}{match['path']}.{names[match['leaf']]}"] = weights[key]
    return config, tensors


def _control(leaves: Tensors, keys: Mapping[str, Any]) -> np.ndarray:
    """The keys and values of all layers, worked out where an MLP makes them."""
    if leaves.keys() == {"control_trans"}:
        return leaves["control_trans"]
    layers = [f"control_trans.{layer}.{leaf}" for layer in (0, 2) for leaf in ("weight", "bias")]
    if leaves.keys() != {"wte.weight", *layers}:
        raise InputError(f"the prefix has the tensors {shortened(sorted(leaves))}, but not those wanted")
    kind = str(keys.get("non_linearity", "tanh")).lower()
    check_choice("non_linearity", kind, NON_LINEARITIES)
    words, (first, first_bias, last, last_bias) = leaves["wte.weight"], (leaves[name] for name in layers)
    found = [value.shape for value in (words, first, first_bias, last, last_bias)]
    if not all(found):
        raise InputError("the prefix's tensors must have axes, but one is a single number")
    count, width, inner, result = words.shape[0], words.shape[-1], first.shape[0], last.shape[0]
    if found != [(count, width), (inner, width), (inner,), (result, inner), (result,)]:
        raise InputError("the layers of the prefix's MLP don't fit together")
    hidden = NON_LINEARITIES[kind]()(ms.Tensor(words @ first.T + first_bias)).asnumpy()
    return hidden @ last.T + last_bias


def _matched(weights: Tensors, pattern: re.Pattern) -> dict[str, re.Match]:
    """The names' parts; refused if they are others' or of several adapters."""
    found = {key: pattern.fullmatch(key) for key in weights}
    strange = [key for key, match in found.items() if match is None]
    if strange or not found:
        raise InputError(f"the weights hold tensors of another method: {shortened(strange) or 'none at all'}")
    names = sorted({match["name"] for match in found.values()})
    if len(names) > 1:
        raise InputError(f"the weights hold several adapters: {', '.join(names)}")
    return found
