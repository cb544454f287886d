"""One configuration of one method, which tests/parity/test_methods.py compares with PEFT in every way."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any

HEADS = ("sequence", "token", "masked")
TASK_TYPES = {"sequence": "SEQ_CLS", "token": "TOKEN_CLS"}


@dataclass(frozen=True)
class Case:
    """A method's configuration.

    Attributes:
        name: what the table of methods calls it.
        config: the name of the config class, here and in PEFT.
        options: its arguments, the same on both sides; ``task_type`` is added.
        peft_options: arguments that only PEFT is given.
        merges: whether it can be merged.
        names: what PEFT calls a parameter -> what it is called here, where they differ (plain names).
        heads: the heads that it is tried on.
        rate: the learning rate of the training curve.
        tolerance: of logits; more than the default only where PEFT's own arithmetic is that rough.
    """

    name: str
    config: str
    options: Mapping[str, Any]
    peft_options: Mapping[str, Any] = field(default_factory=dict)
    merges: bool = True
    names: Mapping[str, str] = field(default_factory=dict)
    heads: tuple[str, ...] = HEADS
    rate: float = 2e-3
    tolerance: float = 1e-5


def all_cases() -> Iterator[Case]:
    """The cases of every file in tests/parity/cases."""
    for path in sorted((Path(__file__).parent / "cases").glob("*.py")):
        yield from import_module(f"tests.parity.cases.{path.stem}").CASES
