"""The configs inside LoRA's: those of initialisations, key by key Hugging Face PEFT's."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, TypeVar

from mindpeft.errors import InputError, did_you_mean
from mindpeft.tuners.targeted import check_choice, check_count, check_number

SubConfig = TypeVar("SubConfig")


@dataclass
class EvaConfig:
    """What ``init_lora_weights="eva"`` gathers, and how it shares the ranks out.

    Attributes:
        rho: a cell's rank may grow up to ``rho`` times; at least 1, which leaves the ranks as they are.
        tau: the cosine similarity of a component in two batches from which on it counts as found, in [0, 1].
        use_label_mask: leave the tokens out whose label is ``label_mask_value``, if each has a label.
        label_mask_value: that label.
        whiten: divide each row of A by the root of its singular value.
        adjust_scaling_factors: keep alpha / r where the rank changes.

    Raises:
        InputError: a value is not allowed.
    """

    rho: float = 2.0
    tau: float = 0.99
    use_label_mask: bool = True
    label_mask_value: int = -100
    whiten: bool = False
    adjust_scaling_factors: bool = True

    def __post_init__(self) -> None:
        for key in ("rho", "tau", "label_mask_value"):
            check_number(f"eva_config.{key}", getattr(self, key))
        if self.rho < 1:
            raise InputError(f"eva_config.rho must be at least 1, and is {self.rho}")
        if not 0 <= self.tau <= 1:
            raise InputError(f"eva_config.tau must lie in [0, 1], not {self.tau}")
        for key in ("use_label_mask", "whiten", "adjust_scaling_factors"):
            if not isinstance(getattr(self, key), bool):
                raise InputError(f"eva_config.{key} must be true or false, not {getattr(self, key)!r}")


@dataclass
class LoftQConfig:
    """How ``init_lora_weights="loftq"`` quantises.

    Attributes:
        loftq_bits: 2, 4 or 8. Hugging Face PEFT has 2 up to 0.18 only.
        loftq_iter: how often the weight and the adapter are made in turn.

    Raises:
        InputError: a value is not allowed.
    """

    loftq_bits: int = 4
    loftq_iter: int = 1

    def __post_init__(self) -> None:
        check_choice("loftq_config.loftq_bits", self.loftq_bits, (2, 4, 8))
        check_count("loftq_config.loftq_iter", self.loftq_iter)


def sub_config(key: str, value: Any, owner: type[SubConfig]) -> SubConfig | None:
    """A config inside another, from the object of keys and values that a file or a recipe has.

    Raises:
        InputError: it is of another kind, or has an unknown key or a bad value.
    """
    if value is None or isinstance(value, owner):
        return value
    if not isinstance(value, Mapping):
        raise InputError(f"{key} must be an object of keys and values ({owner.__name__}), not {value!r}")
    known = [entry.name for entry in fields(owner)]
    for name in value:
        if name not in known:
            raise InputError(
                f"{key} has an unknown key {name!r}{did_you_mean(str(name), known)}; "
                f"allowed: {', '.join(known)}"
            )
    return owner(**value)
