"""One adapter on the host: its parts, one for each of its methods."""

from __future__ import annotations

from dataclasses import dataclass, field

from mindpeft.tuners.base import Tensors
from mindpeft.tuners.hooks import TrainingHook
from mindpeft.tuners.plan import Plan


@dataclass
class Part:
    """One method's share of an adapter: most adapters have one part, a hybrid has several.

    Attributes:
        plan: what it is.
        tensors: path -> its tensors, in their true shapes.
        initial: path -> the tensors that were taken out of the base model's weights there, if any were.
        trainable: whether it is trained when its adapter is.
        hook: what the method adds to the training steps that run now.
    """

    plan: Plan
    tensors: dict[str, Tensors]
    initial: dict[str, Tensors] = field(default_factory=dict)
    trainable: bool = True
    hook: TrainingHook | None = None


@dataclass
class Adapter:
    """One adapter on the host.

    Attributes:
        parts: one for each of its methods.
        overrides: base parameter -> its value while this adapter is active.
        trainable: whether its parameters are trained while it is active.
    """

    parts: list[Part]
    overrides: Tensors = field(default_factory=dict)
    trainable: bool = True

    @property
    def replaced(self) -> set[str]:
        """The base parameters that its parts have values of their own for."""
        return set().union(*(part.plan.replaced for part in self.parts))

    @property
    def trained(self) -> set[str]:
        """The base parameters that it trains, unless it is frozen."""
        return set().union(*(part.plan.replaced for part in self.parts if part.trainable))

    @property
    def copies(self) -> set[str]:
        """The base parameters in the cells that it saves whole."""
        return set().union(*(part.plan.copies for part in self.parts))

    @property
    def takes_out(self) -> bool:
        """Whether it began as a part of the base model's weights, which is taken out of them (PiSSA)."""
        return any(part.initial for part in self.parts)

    def size(self, trained: bool = False) -> int:
        """How many numbers its own tensors hold, or those of them that are trained."""
        total = 0
        for part in self.parts:
            if trained and not part.trainable:
                continue
            for path, tensors in part.tensors.items():
                kind, site = part.plan.classes[path], part.plan.sites[path]
                names = kind.trained(site, tensors) if trained else tensors.keys() - kind.BUFFERS
                total += sum(tensors[name].size for name in names)
        return total
