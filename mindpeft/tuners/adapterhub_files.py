"""Folders of AdapterHub's `adapters` library, read into and written from what a PEFT-like folder holds.

bert.encoder.layer.0.output.adapters.NAME.adapter_down.0.weight    there
base_model.model.bert.encoder.layer.0.output.adapter_down.weight   here: whatever the adapter is called
bert.shared_parameters.NAME.phm_rule                               there
base_model.model.phm_rule                                          here
bert.invertible_adapters.NAME.F.0.weight                           there
base_model.model.bert.embeddings.F.first.weight                    here
"""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np

from mindpeft.adapter_files import check_floats, read_tensors, shortened, write_adapter
from mindpeft.config import CONFIG_NAME, PeftConfig
from mindpeft.convert.checkpoint import open_checkpoint
from mindpeft.convert.safetensors_file import write_safetensors
from mindpeft.convert.tensors import RawTensor
from mindpeft.errors import InputError
from mindpeft.files import read_json, write_json
from mindpeft.tuners.base import Tensors
from mindpeft.tuners.bottleneck import BottleneckConfig
from mindpeft.tuners.bottleneck_layers import DOWN, MODULES, NORM_BEFORE, SCALING, UP

WEIGHT_NAMES = ("adapter.safetensors", "pytorch_adapter.bin")
HEAD_NAMES = ("model_head.safetensors", "pytorch_model_head.bin")
HEAD_CONFIG_NAME = "head_config.json"
FORMAT_VERSION = "adapters.1.2.0"  # the release whose keys are written

# The library's names of tensors; the older names of what holds adapters are adapter-transformers 1's.
_OWN = re.compile(
    r"(?P<path>.+)\.(?:adapters|(?:attention|layer)_text_(?:task|lang)_adapters)\.(?P<name>[^.]+)\.(?P<leaf>.+)"
)
_SHARED = re.compile(r"(?:.+\.)?shared_parameters\.(?P<name>[^.]+)\.(?P<leaf>.+)")
_INVERTIBLE = re.compile(
    r"(?P<path>(?:.+\.)?)invertible_(?:lang_)?adapters\.(?P<name>[^.]+)\.(?P<half>[FG])\.(?P<layer>[02])\.(?P<leaf>.+)"
)
_LAYERS = {"0": "first", "2": "last"}  # of a network in an invertible adapter; 1 is its activation
# The names here.
_HERE = re.compile(rf"(?P<path>.+)\.(?P<leaf>{SCALING}|(?:{'|'.join(MODULES)})\.[^.]+)")
_INVERTIBLE_HERE = re.compile(
    r"(?P<path>(?:.+\.)?)embeddings\.(?P<half>[FG])\.(?P<layer>first|last)\.(?P<leaf>.+)"
)
# Names of activations before there was a "version" in the file.
_FORMER_ACTIVATIONS = {"gelu": "gelu_new", "gelu_orig": "gelu"}
# Where the library's plain config differs from the defaults here, which are those of "seq_bn".
_LIBRARY_DEFAULTS = {"original_ln_before": False}
_PEFT_KEYS = {field.name for field in fields(PeftConfig)} | {"modules_to_save"}

logger = logging.getLogger(__name__)


def import_adapterhub(source: str | os.PathLike, folder: str | os.PathLike, prefix: str = "") -> None:
    """Turn a folder that the library wrote into one that ``PeftModel.from_pretrained`` reads.

    Args:
        source: holds ``adapter_config.json``, and ``adapter.safetensors`` or ``pytorch_adapter.bin``.
        folder: made if absent.
        prefix: put before the cells' names, such as "bert." for an adapter saved from a bare ``BertModel``
            that a model with a head shall get.

    Raises:
        InputError: see ``read_adapterhub``; or ``folder`` can't be written.
    """
    config, tensors = read_adapterhub(source, prefix)
    named = {config.CELL_PREFIX + name: value for name, value in tensors.items()}
    write_adapter(Path(folder), [(config, named)])


def export_adapterhub(
    source: str | os.PathLike, folder: str | os.PathLike, name: str = "default", **about: Any
) -> None:
    """Turn a folder of ours into one that the library's ``load_adapter`` reads.

    Its weights are ``adapter.safetensors``, so load it with ``use_safetensors=True``.

    Args:
        source: written by ``PeftModel.save_pretrained``, with ``peft_type`` BOTTLENECK.
        folder: made if absent.
        name: what to call the adapter.
        about: ``model_type``, ``model_class``, ``model_name`` of the base model, which the library notes but
            does not need.

    Raises:
        InputError: it is another method's adapter, files are missing or damaged, or ``folder`` can't be
            written.
    """
    config = BottleneckConfig.from_pretrained(source)
    write_adapterhub(folder, config, read_tensors(source, config), name, **about)


def read_adapterhub(folder: str | os.PathLike, prefix: str = "") -> tuple[BottleneckConfig, Tensors]:
    """Read a folder that the library wrote.

    Args:
        folder: see ``import_adapterhub``.
        prefix: see there.

    Returns:
        the config, and the tensors as ``mindpeft.adapter_files.read_tensors`` gives them.

    Raises:
        InputError: files are missing or damaged, or hold something else than a bottleneck adapter.
    """
    folder = Path(folder)
    content = read_json(folder / CONFIG_NAME)
    if not isinstance(content, dict) or not isinstance(content.get("config"), dict):
        raise InputError(f'{folder / CONFIG_NAME} is not from AdapterHub: it has no "config" with keys')
    try:
        weights = _read_weights(folder, WEIGHT_NAMES)
        config = _read_config(content, any(map(_INVERTIBLE.fullmatch, weights)))
        tensors = _renamed(weights, config.ln_before, prefix)
        if config.phm_layer and (config.shared_phm_rule or config.shared_W_phm) and _has_no_shared(tensors):
            raise InputError(
                "the file lacks the tensors that all layers share; the library leaves them out when it "
                "saves from a model without a head, so save from one with a head"
            )
    except InputError as error:
        raise InputError(f"{folder}: {error}") from error
    head = _read_head(folder)
    config.modules_to_save = sorted({name.rpartition(".")[0] for name in head}) or None
    return config, tensors | head


def _read_config(content: Mapping[str, Any], is_invertible: bool) -> BottleneckConfig:
    """The library's config with what is around it.

    Args:
        content: the file's.
        is_invertible: the weights hold an invertible adapter.
    """
    keys = dict(content["config"])
    architecture = keys.pop("architecture", None)
    if architecture is not None:
        raise InputError(f"only bottleneck adapters are read, but its architecture is {architecture!r}")
    if "version" not in content:
        former = str(keys.get("non_linearity"))
        keys["non_linearity"] = _FORMER_ACTIVATIONS.get(former, former)
    earlier = keys.pop("invertible_adapter", None)
    if earlier:
        if not isinstance(earlier, dict) or not {"block_type", "reduction_factor"} <= earlier.keys():
            raise InputError(
                f"invertible_adapter must be an object with block_type and reduction_factor, not {earlier!r}"
            )
        keys["inv_adapter"] = earlier["block_type"]
        keys["inv_adapter_reduction_factor"] = earlier["reduction_factor"]
    if content.get("type") == "text_task" and not is_invertible:  # once named, though never there
        keys["inv_adapter"] = keys["inv_adapter_reduction_factor"] = None
    mapping = None
    if content.get("model_class"):
        mapping = {"base_model_class": content["model_class"], "parent_library": "transformers"}
    about = {"auto_mapping": mapping, "base_model_name_or_path": content.get("model_name") or None}
    return BottleneckConfig.from_dict(
        {**_LIBRARY_DEFAULTS, **keys, **about, "peft_type": BottleneckConfig.METHOD.value}
    )


def _read_weights(folder: Path, names: Iterable[str]) -> Tensors:
    path = next((folder / name for name in names if (folder / name).is_file()), None)
    if path is None:
        raise InputError(f"neither {' nor '.join(names)} is there")
    with open_checkpoint(path) as checkpoint:
        check_floats(checkpoint, checkpoint)
        return {name: checkpoint[name].numpy() for name in checkpoint}


def _renamed(tensors: Mapping[str, np.ndarray], ln_before: bool, prefix: str) -> Tensors:
    """The library's tensors by their names here."""
    found, adapters, strange = {}, set(), []
    for key, value in tensors.items():
        match = _OWN.fullmatch(key) or _SHARED.fullmatch(key) or _INVERTIBLE.fullmatch(key)
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


def _has_no_shared(tensors: Iterable[str]) -> bool:
    return all("." in name for name in tensors)


def _read_head(folder: Path) -> Tensors:
    """The head saved beside an adapter, if it is one of a model's own."""
    if not any((folder / name).is_file() for name in HEAD_NAMES):
        return {}
    head = _read_weights(folder, HEAD_NAMES)
    if any(name.count(".") != 1 for name in head):
        logger.warning("%s: the head is left out, since it is no cell of the model's own", folder)
        return {}
    return head


def write_adapterhub(
    folder: str | os.PathLike,
    config: BottleneckConfig,
    tensors: Mapping[str, np.ndarray],
    name: str = "default",
    **about: Any,
) -> None:
    """Write a folder as the library does, the config last.

    Args:
        folder: made if absent.
        config: what the adapter is.
        tensors: as ``read_adapterhub`` gives them.
        name: what to call the adapter.
        about: see ``export_adapterhub``.

    Raises:
        InputError: the name can't be one, or the folder can't be written.
    """
    if not name or "." in name:
        raise InputError(f"{name!r} can't name an adapter in AdapterHub's format: it must have no dot")
    folder = Path(folder)
    places = {match["path"] for match in map(_HERE.fullmatch, tensors) if match}
    if not places:
        raise InputError("there is nothing to write: the adapter has no tensors in any layer")
    base = min(places).partition("encoder.")[0]  # the base model's name in a model with a head
    weights, head = {}, {}
    for key, value in tensors.items():
        match, inverted = _HERE.fullmatch(key), _INVERTIBLE_HERE.fullmatch(key)
        if inverted:
            number = next(old for old, new in _LAYERS.items() if new == inverted["layer"])
            network = f"{inverted['half']}.{number}.{inverted['leaf']}"
            weights[f"{inverted['path']}invertible_adapters.{name}.{network}"] = value
        elif match:
            for leaf in _leaves_there(match["leaf"], config.ln_before):
                weights[f"{match['path']}.adapters.{name}.{leaf}"] = value
        elif "." not in key:
            weights[f"{base}shared_parameters.{name}.{key}"] = value
        else:
            head[key] = value
    keys = {key: value for key, value in config.to_dict().items() if key not in _PEFT_KEYS}
    outer = {"hidden_size": _hidden_size(tensors), "version": FORMAT_VERSION, **_about(config), **about}
    _write(folder / WEIGHT_NAMES[0], weights)
    if head:
        _write(folder / HEAD_NAMES[0], head)
        if outer["model_class"]:  # else the library takes the head as it comes
            write_json(folder / HEAD_CONFIG_NAME, {**outer, "config": None, "name": None})
    write_json(folder / CONFIG_NAME, {**outer, "config": keys, "name": name})


def _about(config: BottleneckConfig) -> dict[str, str | None]:
    """What the config knows of the base model, by the library's keys."""
    return {
        "model_class": (config.auto_mapping or {}).get("base_model_class"),
        "model_name": config.base_model_name_or_path,
        "model_type": None,
    }


def _hidden_size(tensors: Tensors) -> int | None:
    biases = (value for name, value in tensors.items() if name.endswith((f"{UP}.bias", f"{UP}.b")))
    return next((len(bias) for bias in biases), None)


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


def _write(path: Path, tensors: Mapping[str, np.ndarray]) -> None:
    write_safetensors(path, ((name, RawTensor.from_numpy(value)) for name, value in tensors.items()))
