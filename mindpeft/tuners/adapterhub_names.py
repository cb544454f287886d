"""What AdapterHub's `adapters` library calls the tensors of bottleneck adapters, and its files of tensors.

bert.encoder.layer.0.output.adapters.NAME.adapter_down.0.weight    there
base_model.model.bert.encoder.layer.0.output.adapter_down.weight   here: whatever the adapter is called
bert.shared_parameters.NAME.phm_rule                               there
base_model.model.phm_rule                                          here
bert.invertible_adapters.NAME.F.0.weight                           there
base_model.model.bert.embeddings.F.first.weight                    here
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from mindpeft.adapter_files import check_floats, shortened
from mindpeft.config import PeftConfig
from mindpeft.convert.checkpoint import open_checkpoint
from mindpeft.convert.safetensors_file import write_safetensors
from mindpeft.convert.tensors import RawTensor
from mindpeft.errors import InputError
from mindpeft.tuners.base import Tensors
from mindpeft.tuners.bottleneck_layers import DOWN, MODULES, NORM_BEFORE, SCALING

HEAD_NAMES = ("model_head.safetensors", "pytorch_model_head.bin")
FORMAT_VERSION = "adapters.1.2.0"  # the release whose keys are written

# The library's names of tensors; the older names of what holds adapters are adapter-transformers 1's.
_OWN = re.compile(
    r"(?P<path>.+)\.(?:adapters|(?:attention|layer)_text_(?:task|lang)_adapters)\.(?P<name>[^.]+)\.(?P<leaf>.+)"
)
_SHARED = re.compile(r"(?:.+\.)?shared_parameters\.(?P<name>[^.]+)\.(?P<leaf>.+)")
INVERTIBLE = re.compile(
    r"(?P<path>(?:.+\.)?)invertible_(?:lang_)?adapters\.(?P<name>[^.]+)\.(?P<half>[FG])\.(?P<layer>[02])\.(?P<leaf>.+)"
)
_LAYERS = {"0": "first", "2": "last"}  # of a network in an invertible adapter; 1 is its activation
# The names here.
HERE = re.compile(rf"(?P<path>.+)\.(?P<leaf>{SCALING}|(?:{'|'.join(MODULES)})\.[^.]+)")
_INVERTIBLE_HERE = re.compile(
    r"(?P<path>(?:.+\.)?)embeddings\.(?P<half>[FG])\.(?P<layer>first|last)\.(?P<leaf>.+)"
)
logger = logging.getLogger(__name__)


def names_here(tensors: Mapping[str, np.ndarray], ln_before: bool, prefix: str) -> Tensors:
    """The library's tensors by their names here."""
    found, adapters, strange = {}, set(), []
    for key, value in tensors.items():
        match = _OWN.fullmatch(key) or _SHARED.fullmatch(key) or INVERTIBLE.fullmatch(key)
        if match is None:
            strange.append(key)
            continue
        adapters.add(match["name"])
        if match.re is _SHARED:
            found[match["leaf"]] = value
        elif match.re is _OWN:
            found[f"{prefix}{match['path']}.{_leaf_here(match['leaf'], ln_before)}"] = value
        else:
            network = f"{match['half']}.{_LAYERS[match['layer']]}"
            found[f"{prefix}{match['path']}embeddings.{network}.{match['leaf']}"] = value
    if strange:
        raise InputError(f"the weights hold tensors of no bottleneck adapter: {shortened(strange)}")
    if len(adapters) > 1:
        raise InputError(f"the weights hold several adapters: {', '.join(sorted(adapters))}")
    return found


def _leaf_here(leaf: str, ln_before: bool) -> str:
    """A tensor's name at its place. The library counts the cells before the activation, the norm first."""
    if leaf == "scaling":
        return SCALING
    module, _, rest = leaf.partition(".")
    if module != DOWN:
        return leaf
    number, _, rest = rest.partition(".")
    return f"{NORM_BEFORE}.{rest}" if ln_before and number == "0" else f"{DOWN}.{rest}"


def names_there(
    tensors: Mapping[str, np.ndarray], ln_before: bool, name: str, base: str
) -> tuple[Tensors, Tensors]:
    """Tensors by the library's names: the adapter's, and the head's.

    Args:
        tensors: by their names here.
        ln_before: the config's.
        name: what to call the adapter.
        base: how the names of the base model's cells begin in a model with a head.
    """
    weights, head = {}, {}
    for key, value in tensors.items():
        match, inverted = HERE.fullmatch(key), _INVERTIBLE_HERE.fullmatch(key)
        if inverted:
            number = next(old for old, new in _LAYERS.items() if new == inverted["layer"])
            network = f"{inverted['half']}.{number}.{inverted['leaf']}"
            weights[f"{inverted['path']}invertible_adapters.{name}.{network}"] = value
        elif match:
            for leaf in _leaves_there(match["leaf"], ln_before):
                weights[f"{match['path']}.adapters.{name}.{leaf}"] = value
        elif "." not in key:
            weights[f"{base}shared_parameters.{name}.{key}"] = value
        else:
            head[key] = value
    return weights, head


def _leaves_there(leaf: str, ln_before: bool) -> Iterator[str]:
    """A tensor's names in the library, which keeps the norm before the bottleneck under two."""
    module, _, rest = leaf.partition(".")
    if leaf == SCALING:
        yield "scaling"
    elif module == DOWN:
        yield f"{DOWN}.{1 if ln_before else 0}.{rest}"
    else:
        yield leaf
        if module == NORM_BEFORE:
            yield f"{DOWN}.0.{rest}"


def read_weights(folder: Path, names: Iterable[str]) -> Tensors:
    """The tensors of the first of these files that there is."""
    path = next((folder / name for name in names if (folder / name).is_file()), None)
    if path is None:
        raise InputError(f"neither {' nor '.join(names)} is there")
    with open_checkpoint(path) as checkpoint:
        check_floats(checkpoint, checkpoint)
        return {name: checkpoint[name].numpy() for name in checkpoint}


def read_head(folder: Path) -> Tensors:
    """The head saved beside an adapter, if it is one of a model's own."""
    if not any((folder / name).is_file() for name in HEAD_NAMES):
        return {}
    head = read_weights(folder, HEAD_NAMES)
    if any(name.count(".") != 1 for name in head):
        logger.warning("%s: the head is left out, since it is no cell of the model's own", folder)
        return {}
    return head


def base_keys(content: Mapping[str, Any]) -> dict[str, Any]:
    """What a config of the library's says about the base model, by the keys here."""
    mapping = None
    if content.get("model_class"):
        mapping = {"base_model_class": content["model_class"], "parent_library": "transformers"}
    return {"auto_mapping": mapping, "base_model_name_or_path": content.get("model_name") or None}


def about_base(config: PeftConfig) -> dict[str, str | None]:
    """What the config knows of the base model, by the library's keys."""
    return {
        "model_class": (config.auto_mapping or {}).get("base_model_class"),
        "model_name": config.base_model_name_or_path,
        "model_type": None,
    }


def write_weights(path: Path, tensors: Mapping[str, np.ndarray]) -> None:
    """Write a file of tensors."""
    write_safetensors(path, ((name, RawTensor.from_numpy(value)) for name, value in tensors.items()))
