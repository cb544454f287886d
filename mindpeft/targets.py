"""Which cells of a model a config means: matching by name exactly as Hugging Face PEFT does it.

A config's targets are resolved against the names of the *base* model's cells, before anything is changed.
"""

from __future__ import annotations

import difflib
import logging
import re
from collections.abc import Callable, Collection, Iterable, Mapping
from enum import Enum, auto
from typing import Any

from mindpeft.config import TaskType
from mindpeft.errors import InputError

ALL_LINEAR = "all-linear"
CONDENSE_FROM = 20  # lists of at least so many names are written as the shortest suffixes that mean the same
SEQ_CLS_HEADS = ("score", "classifier")  # in PEFT's order: the first one found is the head

logger = logging.getLogger(__name__)

_QV_PROJ = ["q_proj", "v_proj"]

# LoRA's default targets by the base model's `model_type`, those of PEFT.
_SHARED_TARGETS: dict[str, list[str]] = {
    "t5 mt5": ["q", "v"],
    "bart opt gptj gpt_neo stablelm llama llama4 mistral mixtral": _QV_PROJ,
    "gemma gemma2 gemma3_text qwen2 qwen3": _QV_PROJ,
    "bert roberta xlm-roberta electra layoutlm": ["query", "value"],
    "bloom gpt_neox chatglm falcon RefinedWeb RefinedWebModel": ["query_key_value"],
    "gpt2 gpt_bigcode": ["c_attn"],
    "blip-2": ["q", "v", *_QV_PROJ],
    "deberta-v2": ["query_proj", "value_proj"],
    "deberta": ["in_proj"],
    "mpt": ["Wqkv"],
    "btlm": ["c_proj", "c_attn"],
    "codegen": ["qkv_proj"],
    "phi": [*_QV_PROJ, "fc1", "fc2"],
    "nemotron_h": ["q_proj", "k_proj", "v_proj", "o_proj"],
    "rwkv": ["key", "value", "receptance", "output"],
    "rwkv7": ["r_proj", "k_proj", "v_proj", "o_proj", "key", "value"],
}
LORA_TARGETS: dict[str, list[str] | str] = {
    "gemma4": r".*language_model\..*\.(q_proj|v_proj)",
    **{model: names for models, names in _SHARED_TARGETS.items() for model in models.split()},
}


class Match(Enum):
    """How a cell's name fares against a config."""

    TARGET = auto()
    EXCLUDED = auto()
    NONE = auto()


def match_name(config: Any, name: str) -> Match:
    """Decide whether ``config`` targets the cell ``name`` (a dotted path).

    Excluded names and anything under a ``modules_to_save`` entry never match. A string is a regular
    expression for the full path; a list holds full paths or dotted suffixes, which ``layers_to_transform``
    may narrow.
    """
    if _is_excluded(config, name):
        return Match.EXCLUDED
    targets = config.target_modules
    if isinstance(targets, str):
        found = re.fullmatch(targets, name) is not None
    elif name in targets:
        found = True
    else:
        found = _has_suffix(name, targets) and _layer_allowed(config, name)
    return Match.TARGET if found else Match.NONE


def _is_excluded(config: Any, name: str) -> bool:
    exclude = getattr(config, "exclude_modules", None)
    if isinstance(exclude, str) and exclude:
        if re.fullmatch(exclude, name):
            return True
    elif exclude and (name in exclude or _has_suffix(name, exclude)):
        return True
    saved = getattr(config, "modules_to_save", None) or ()
    return any(re.match(rf"(^|.*\.){module}($|\..*)", name) for module in saved)


def _has_suffix(name: str, suffixes: Iterable[str]) -> bool:
    return any(name.endswith(f".{suffix}") for suffix in suffixes)


def _layer_allowed(config: Any, name: str) -> bool:
    """Whether ``layers_to_transform`` and ``layers_pattern`` let this name pass."""
    layers = getattr(config, "layers_to_transform", None)
    if layers is None or layers == []:
        return True
    index = layer_index(name, getattr(config, "layers_pattern", None))
    return index is not None and index in ([layers] if isinstance(layers, int) else layers)


def layer_index(name: str, patterns: str | list[str] | None) -> int | None:
    """The first numeric segment (after a segment, and before another), or the one after a pattern's name."""
    if not patterns:
        expressions = [r".*?\.[^.]*\.(\d+)\."]
    else:
        names = [patterns] if isinstance(patterns, str) else patterns
        expressions = [rf"(?:^|.*?\.){pattern}\.(?P<idx>\d+)\." for pattern in names]
    for expression in expressions:
        match = re.match(expression, name)
        if match:
            return int(match.groupdict().get("idx") or match.group(1))
    return None


def pattern_value(patterns: Mapping[str, Any] | None, name: str, default: Any) -> Any:
    """The value of the first ``rank_pattern``/``alpha_pattern`` key that matches the end of ``name``."""
    for key, value in (patterns or {}).items():
        if re.match(rf"(.*\.)?({key})$", name):
            return value
    return default


def resolve_targets(
    config: Any,
    names: Collection[str],
    linear_names: Callable[[], Collection[str]],
    model_type: str | None,
    defaults: Mapping[str, list[str] | str] = LORA_TARGETS,
) -> set[str] | str:
    """Return the targets that a config will be saved with: defaults filled in, "all-linear" spelled out.

    Args:
        config: its ``target_modules`` may be ``None`` (the model type's default) or "all-linear".
        names: the names of all cells of the base model.
        linear_names: gives the linear cells without the output head; called for "all-linear" only.
        model_type: the base model's ``config.model_type``.
        defaults: the method's targets by model type.

    Raises:
        InputError: there is no default for this model type.
    """
    targets = config.target_modules
    if targets is None:
        if model_type not in defaults:
            raise InputError(
                f"target_modules is not set and there is no default for model_type {model_type!r}; "
                f"name some cells, such as {_examples(names)}"
            )
        targets = defaults[model_type]
    if isinstance(targets, str):
        if targets.lower() != ALL_LINEAR:
            return targets
        targets = linear_names()
    targets = set(targets)
    return condense(targets, names) if len(targets) >= CONDENSE_FROM else targets


def output_head_names(model: Any, cells: Mapping[str, Any], task_type: TaskType | None) -> set[str]:
    """The output head that "all-linear" leaves out: of a language model, or of a sequence classifier."""
    getter = getattr(model, "get_output_embeddings", None)
    head = getter() if getter else None
    if head is None and task_type == TaskType.SEQ_CLS:
        head = next((cells[name] for name in SEQ_CLS_HEADS if name in cells), None)
    return {name for name, cell in cells.items() if cell is head}


def condense(targets: Collection[str], names: Collection[str]) -> set[str]:
    """The shortest suffixes that match the same cells as ``targets`` do; ``targets`` if nothing is gained."""
    suffixes = tuple(f".{target}" for target in targets)
    others = {name for name in names if name not in targets and not name.endswith(suffixes)}
    forbidden = {suffix for name in others for suffix in _suffixes(name)}
    chosen: set[str] = set()
    for target in sorted(targets, key=_suffixes):
        for suffix in _suffixes(target):
            if suffix in chosen or suffix in forbidden or _has_suffix(target, chosen):
                continue
            chosen.add(suffix)
            break
    return chosen if chosen and len(chosen) < len(targets) else set(targets)


def _suffixes(name: str) -> list[str]:
    """The dotted suffixes of a name, shortest first."""
    parts = name.split(".")
    return [".".join(parts[start:]) for start in reversed(range(len(parts)))]


def find_targets(config: Any, names: Iterable[str]) -> list[str]:
    """Return the names of the cells that ``config`` (with resolved targets) means, in the model's order.

    A listed target that nothing matches, while others do, is named in a warning (PEFT keeps silent).

    Raises:
        InputError: nothing matches; the message shows real names and the nearest one.
    """
    names = [name for name in names if name]
    try:
        matches = {name: match_name(config, name) for name in names}
    except re.error as error:
        raise InputError(f"a pattern of the config is not a regular expression: {error}") from error
    found = [name for name, match in matches.items() if match is Match.TARGET]
    if not found:
        raise InputError(_no_match(config, matches))
    _warn_of_idle_entries(config, found, matches)
    return found


def _warn_of_idle_entries(config: Any, found: list[str], matches: Mapping[str, Match]) -> None:
    """Name, in warnings, the entries of the config that changed nothing."""
    if not isinstance(config.target_modules, str):
        idle = [t for t in sorted(config.target_modules) if t not in found and not _any_suffix(found, t)]
        if idle:
            logger.warning("target_modules that matched no cell: %s", ", ".join(idle))
    if getattr(config, "exclude_modules", None) and Match.EXCLUDED not in matches.values():
        logger.warning("exclude_modules excluded no cell: %s", config.exclude_modules)
    if getattr(config, "target_parameters", None):
        return  # the patterns may mean those
    for attribute in ("rank_pattern", "alpha_pattern"):
        patterns = getattr(config, attribute, None) or {}
        patterns = [key for key, value in patterns.items() if not isinstance(value, list)]  # not AdaLoRA's
        idle = [key for key in patterns if not any(re.match(rf"(.*\.)?({key})$", name) for name in found)]
        if idle:
            logger.warning("%s keys that matched no targeted cell: %s", attribute, ", ".join(sorted(idle)))


def _any_suffix(names: Iterable[str], suffix: str) -> bool:
    return any(name.endswith(f".{suffix}") for name in names)


def _no_match(config: Any, matches: Mapping[str, Match]) -> str:
    targets = config.target_modules
    shown = repr(targets) if isinstance(targets, str) else ", ".join(sorted(targets))
    reasons = [
        f"{key}={getattr(config, key)!r}"
        for key in ("exclude_modules", "modules_to_save", "layers_to_transform", "layers_pattern")
        if getattr(config, key, None)
    ]
    narrowed = f" (with {', '.join(reasons)})" if reasons else ""
    return (
        f"no cell matches target_modules {shown}{narrowed}; the model has cells such as "
        f"{_examples(matches)}{_nearest(targets, matches)}"
    )


def _nearest(targets: str | Iterable[str], names: Iterable[str]) -> str:
    """A hint with the cell's last name nearest to a target's last name."""
    wanted = [targets] if isinstance(targets, str) else sorted(targets)
    leaves = sorted({name.rsplit(".", 1)[-1] for name in names})
    for target in wanted:
        near = difflib.get_close_matches(target.rsplit(".", 1)[-1], leaves, n=1, cutoff=0.5)
        if near:
            return f"; did you mean {near[0]!r}?"
    return ""


def _examples(names: Iterable[str], count: int = 6) -> str:
    """A few real names, one of each kind: the first of every last segment, deepest cells first."""
    kinds: dict[str, str] = {}
    for name in names:
        leaf = name.rsplit(".", 1)[-1]
        if not leaf.isdigit():
            kinds.setdefault(leaf, name)
    deepest = sorted(kinds.values(), key=lambda name: -name.count("."))
    return ", ".join(repr(name) for name in deepest[:count])


def saved_modules(config: Any, names: Iterable[str]) -> list[str]:
    """The cells ``modules_to_save`` means: every name that *ends* with an entry, dot or not, as in PEFT."""
    entries = getattr(config, "modules_to_save", None) or ()
    return [name for name in names if name and name.endswith(tuple(entries))]
