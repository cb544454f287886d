"""A new adapter out of several: ``add_weighted_adapter``."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from mindpeft.errors import InputError
from mindpeft.tuners.base import Site, Tensors, padded
from mindpeft.tuners.lora_layers import LoraEmbedding, LoraLayer, LoraLinear
from mindpeft.tuners.targeted import check_choice, check_count, check_number
from mindpeft.tuners.task_vectors import COMBINATIONS, check_combination, combine

if TYPE_CHECKING:
    from mindpeft.config import PeftConfig
    from mindpeft.tuners.adapter import Part
    from mindpeft.tuners.bank import AdapterBank

COMBINATION_TYPES = ("cat", "svd", *COMBINATIONS, *(f"{name}_svd" for name in COMBINATIONS[1:]))


@dataclass(frozen=True)
class Recipe:
    """How adapters are combined.

    Attributes:
        combination_type: "cat", "svd", one of ``COMBINATIONS``, or such a one with "_svd".
        svd_rank: the rank of a decomposition; default: the largest of the adapters.
        svd_clamp: the quantile at which a decomposition's factors are cut off.
        density: the share of entries that pruning keeps.
        majority_sign_method: see ``task_vectors.elected_mean``.

    Raises:
        InputError: a value is not allowed.
    """

    combination_type: str = "svd"
    svd_rank: int | None = None
    svd_clamp: float | None = None
    density: float | None = None
    majority_sign_method: str = "total"

    def __post_init__(self) -> None:
        check_choice("combination_type", self.combination_type, COMBINATION_TYPES)
        if self.svd_rank is not None:
            check_count("svd_rank", self.svd_rank)
        if self.svd_clamp is not None and not 0 < self.svd_clamp <= 1:
            raise InputError(f"svd_clamp must lie in (0, 1], not {self.svd_clamp!r}")
        if self.combination_type != "cat":
            check_combination(self.method, self.density, self.majority_sign_method)

    @property
    def method(self) -> str:
        """The arithmetic of ``task_vectors.combine``."""
        return "linear" if self.combination_type == "svd" else self.combination_type.removesuffix("_svd")

    @property
    def decomposes(self) -> bool:
        """Whether whole updates are combined and decomposed again, rather than A and B by themselves."""
        return self.combination_type.endswith("svd")


@dataclass(frozen=True)
class Share:
    """One adapter's part at one cell, and its weight."""

    site: Site
    kind: type[LoraLayer]
    tensors: Tensors
    weight: float

    @property
    def factor(self) -> float:
        """The weight times the adapter's scaling there."""
        return self.weight * self.kind.scaling_of(self.site)

    @property
    def factors(self) -> tuple[np.ndarray, np.ndarray]:
        """A (r, in) and B (out, r)."""
        a, b = self.kind.NAMES
        return self.tensors[a], self.tensors[b]


def add_weighted_adapter(
    bank: AdapterBank, names: Sequence[str], weights: Sequence[float], adapter_name: str, recipe: Recipe
) -> None:
    """Add a LoRA adapter combined of others; see ``PeftModel.add_weighted_adapter``."""
    parts = _parts(bank, names, weights)
    rank = _rank(parts, recipe)
    tensors: Tensors = {}
    for path in dict.fromkeys(path for part in parts for path in part.plan.classes):
        shares = [
            Share(part.plan.sites[path], part.plan.classes[path], part.tensors[path], weight)
            for part, weight in zip(parts, weights, strict=True)
            if path in part.plan.classes
        ]
        values = [
            padded(value, _with_rank(value, axis, rank))
            for axis, value in enumerate(_combined(shares, recipe, rank))
        ]
        tensors |= {f"{path}.{name}": v for name, v in zip(shares[0].kind.NAMES, values, strict=True)}
    owner, heads = _heads(bank, names)
    config = replace(
        parts[0].plan.config,
        r=rank,
        lora_alpha=rank,
        target_modules=sorted({path for part in parts for path in part.plan.classes}),
        exclude_modules=None,
        layers_to_transform=None,
        layers_pattern=None,
        rank_pattern={},
        alpha_pattern={},
        use_rslora=False,
        modules_to_save=owner.modules_to_save if owner else None,
        task_type=owner.task_type if owner else None,
    )
    bank.add(adapter_name, [config], [tensors | heads], trainable=False)


def _heads(bank: AdapterBank, names: Sequence[str]) -> tuple[PeftConfig | None, Tensors]:
    """The config of the one adapter that has saved cells, and their values; heads of several don't add up."""
    owners = [name for name in names if bank.adapters[name].overrides]
    if len(owners) > 1:
        raise InputError(
            f"{', '.join(owners)} have saved cells (modules_to_save, the task's head) of their own, which "
            "can't be combined; at most one of the adapters may have them"
        )
    if not owners:
        return None, {}
    adapter = bank.adapters[owners[0]]
    return adapter.parts[0].plan.config, dict(adapter.overrides)


def _parts(bank: AdapterBank, names: Sequence[str], weights: Sequence[float]) -> list[Part]:
    """The adapters' parts, checked: plain LoRA on linear and embedding cells, nothing else trained."""
    if not names or len(names) != len(weights):
        raise InputError(f"give one weight for each adapter: {len(names)} adapters, {len(weights)} weights")
    for weight in weights:
        check_number("weights", weight)
    bank.write_back()
    parts = []
    for name in names:
        bank.require(name)
        adapter = bank.adapters[name]
        kinds = {kind for part in adapter.parts for kind in part.plan.classes.values()}
        if len(adapter.parts) > 1 or not kinds <= {LoraLinear, LoraEmbedding}:
            raise InputError(f"the adapter {name!r} is not of LoRA on linear and embedding cells alone")
        if adapter.takes_out:
            raise InputError(
                f"the adapter {name!r} takes a part out of the base model's weights and can't be combined; "
                "save it with convert_to_lora=True and load that"
            )
        config = adapter.parts[0].plan.config
        if config.lora_bias or config.bias != "none":
            raise InputError(f"the adapter {name!r} trains biases, which can't be combined")
        parts.append(adapter.parts[0])
    return parts


def _rank(parts: list[Part], recipe: Recipe) -> int:
    """The rank of the result."""
    ranks = [
        {part.plan.classes[path].rank_of(site) for path, site in part.plan.sites.items()} for part in parts
    ]
    if recipe.combination_type == "cat":
        return sum(max(found) for found in ranks)
    if recipe.decomposes:
        return recipe.svd_rank or max(max(found) for found in ranks)
    if len(set.union(*ranks)) > 1:
        raise InputError(
            f"{recipe.combination_type} needs adapters of one rank, but they have "
            f"{', '.join(map(str, sorted(set.union(*ranks))))}; use cat or svd"
        )
    return ranks[0].pop()


def _combined(shares: list[Share], recipe: Recipe, rank: int) -> tuple[np.ndarray, np.ndarray]:
    """The new A and B at a cell, for a scaling of 1; of any rank up to ``rank``."""
    if recipe.combination_type == "cat":
        a = np.concatenate([share.factors[0] * np.float32(share.factor) for share in shares])
        return a, np.concatenate([share.factors[1] for share in shares], axis=1)
    options = (recipe.method, recipe.density, recipe.majority_sign_method)
    if recipe.decomposes:
        updates = [share.kind.product(share.site, share.tensors) for share in shares]
        return _decomposed(
            combine(updates, [share.weight for share in shares], *options), rank, recipe.svd_clamp
        )
    # The sign goes to one side, or it would cancel itself.
    roots = [math.sqrt(abs(share.factor)) for share in shares]
    signed = [math.copysign(root, share.factor) for root, share in zip(roots, shares, strict=True)]
    a, b = (list(side) for side in zip(*(share.factors for share in shares), strict=True))
    return combine(a, signed, *options), combine(b, roots, *options)


def _decomposed(update: np.ndarray, rank: int, clamp: float | None) -> tuple[np.ndarray, np.ndarray]:
    """The best A (r, in) and B (out, r) of this rank for an update (out, in)."""
    left, values, right = np.linalg.svd(update, full_matrices=False)
    a, b = right[:rank], left[:, :rank] * values[:rank]
    if clamp is not None:
        limit = np.quantile(np.concatenate([b.reshape(-1), a.reshape(-1)]), clamp)
        a, b = np.clip(a, -limit, limit), np.clip(b, -limit, limit)
    return a, b


def _with_rank(value: np.ndarray, axis: int, rank: int) -> tuple[int, ...]:
    """The shape of A (axis 0) or B (axis 1) with another rank."""
    return (rank, value.shape[1]) if axis == 0 else (value.shape[0], rank)
