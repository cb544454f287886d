"""One configuration of one method, which test_methods.py compares with its oracle in every way."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np

import mindpeft
from tests.parity.oracles import Oracle, PeftOracle

HEADS = ("sequence", "token", "masked")
TASK_TYPES = {"sequence": "SEQ_CLS", "token": "TOKEN_CLS"}


@dataclass(frozen=True)
class Case:
    """A method's configuration.

    Attributes:
        name: what the table of methods calls it.
        config: the name of the config class, here and in PEFT.
        options: its arguments, the same on both sides; ``task_type`` is added.
        oracle: who says what is right.
        trains: for an oracle in plain torch, whether a parameter of that name is trained.
        merges: whether it can be merged.
        names: what PEFT calls a parameter -> what it is called here, where they differ (plain names); or what
            makes our tensors by name of PEFT's.
        heads: the heads that it is tried on.
        rate: the learning rate of the training curve.
        tolerance: of logits; more than the default only where PEFT's own arithmetic is that rough.
        columns: what a batch has besides.
        in_file_as_trained: whether a file holds what is trained; if not, training is compared from values
            that are handed over in memory.
        virtual: whether it adds virtual positions.
        same_graph: whether another case trains by the same graph, so that one curve is enough by default.
        why: for a column of the table, or "heads", why something is missing there.
    """

    name: str
    config: str
    options: Mapping[str, Any]
    oracle: type[Oracle] = PeftOracle
    trains: Callable[[str], bool] | None = None
    merges: bool = True
    names: Mapping[str, str] | Callable[[dict], dict] = field(default_factory=dict)
    heads: tuple[str, ...] = HEADS
    rate: float = 2e-3
    tolerance: float = 1e-5
    columns: Mapping[str, np.ndarray] = field(default_factory=dict)
    in_file_as_trained: bool = True
    virtual: bool = False
    same_graph: bool = False
    why: Mapping[str, str] = field(default_factory=dict)

    @property
    def method(self) -> str:
        """The method's ``peft_type``."""
        return getattr(mindpeft, self.config).METHOD.value

    def task_type(self, head: str) -> str | None:
        """The task, which decides PEFT's class; it has none for a masked language model."""
        return TASK_TYPES.get(head, "FEATURE_EXTRACTION" if self.virtual else None)

    def config_here(self, head: str) -> mindpeft.PeftConfig:
        """The config of ours."""
        return getattr(mindpeft, self.config)(task_type=self.task_type(head), **self.options)

    def inputs(self, head: str, batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """A batch with this method's columns, without token types where PEFT drops them."""
        dropped = {"token_type_ids"} if self.task_type(head) == "FEATURE_EXTRACTION" else set()
        return {**{name: value for name, value in batch.items() if name not in dropped}, **self.columns}

    def renamed(self, tensors: dict[str, Any]) -> dict[str, Any]:
        """An oracle's tensors by our names."""
        if callable(self.names):
            return self.names(tensors)
        return {self.names.get(name, name): value for name, value in tensors.items()}


def all_cases() -> Iterator[Case]:
    """The cases of every file in tests/parity/cases."""
    for path in sorted((Path(__file__).parent / "cases").glob("*.py")):
        yield from import_module(f"tests.parity.cases.{path.stem}").CASES
