"""What a cell's inputs are like over batches of data: the decompositions behind EVA's A and its ranks."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import mindspore as ms
import numpy as np
from mindspore import Tensor, nn

from mindpeft.errors import InputError
from mindpeft.targets import pattern_value
from mindpeft.tuners.lora_init import low_rank_svd

if TYPE_CHECKING:
    from mindpeft.tuners.lora import LoraConfig

Batch = Mapping[str, Any]
_ITERATIONS = 4  # of the rough decomposition; PEFT's
_MOST_PASSES = 100  # over the data


class IncrementalSVD:
    """The principal components of rows that come in batches.

    Ross et al. 2008, "Incremental Learning for Robust Visual Tracking".

    Args:
        count: how many components.
    """

    def __init__(self, count: int) -> None:
        self.count, self.seen = count, 0
        self.components: np.ndarray | None = None  # (count, features)
        self.values: np.ndarray | None = None  # (count,) singular values
        self.ratio: np.ndarray | None = None  # (count,) shares of the variance
        self.mean = self.variance = np.float64(0)

    def update(self, rows: np.ndarray) -> None:
        """Take further rows, (n, features) float32, into account."""
        n, total = len(rows), self.seen + len(rows)
        batch_mean, batch_variance = rows.mean(0, dtype=np.float64), rows.var(0, dtype=np.float64)
        shift = self.mean - batch_mean
        table = (rows - batch_mean).astype(np.float32)
        if self.components is not None:
            correction = np.sqrt(self.seen / total * n) * shift
            table = np.vstack([self.values[:, None] * self.components, table, correction[None]])
        # Chan, Golub and LeVeque 1979: the variance of both together.
        spread = self.seen * n / total * shift**2 if self.seen else 0
        self.variance = (self.variance * self.seen + batch_variance * n + spread) / total
        self.mean = (self.mean * self.seen + batch_mean * n) / total
        self.seen = total
        values, components = self._decomposed(table.astype(np.float32))
        largest = components[np.arange(len(components)), np.abs(components).argmax(1)]
        self.components = (components * np.sign(largest)[:, None])[: self.count]
        self.values = values[: self.count]
        self.ratio = (self.values**2 / np.sum(self.variance * total)).astype(np.float32)

    def _decomposed(self, table: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        width = 2 * self.count
        if width >= min(table.shape):
            return np.linalg.svd(table, full_matrices=False)[1:]
        return low_rank_svd(table, width, _ITERATIONS)[1:]


@dataclass
class Watched:
    """A cell whose inputs are decomposed.

    Attributes:
        svd: its components so far.
        found: which of them stay the same by now.
    """

    svd: IncrementalSVD
    found: np.ndarray = field(init=False)
    active: bool = True

    def __post_init__(self) -> None:
        self.found = np.zeros(self.svd.count, bool)

    def take(self, rows: np.ndarray, tau: float) -> None:
        """Take a batch into account, unless it has too few rows."""
        before = self.svd.components
        if len(rows) < self.svd.count:
            return
        self.svd.update(rows)
        if before is not None:
            now = self.svd.components
            lengths = np.linalg.norm(now, axis=1) * np.linalg.norm(before, axis=1)
            self.found = (now * before).sum(1) / np.maximum(lengths, 1e-8) >= tau


class Survey:
    """Runs a model over batches and decomposes the inputs of some of its cells.

    Args:
        forward: runs the model, its adapters switched off, on one batch.
        cells: path -> the cell, in the model's order.
        config: the adapter's.
    """

    def __init__(
        self, forward: Callable[[Batch], Any], cells: Mapping[str, nn.Cell], config: LoraConfig
    ) -> None:
        self.forward, self.cells, self.config, self.eva = forward, cells, config, config.eva_config
        self.ranks = {path: pattern_value(config.rank_pattern, path, config.r) for path in cells}
        self.most = {path: round(rank * self.eva.rho) for path, rank in self.ranks.items()}
        self.leaders: dict[str, str] = {}  # path -> the first cell with the same inputs, if it is another one
        self.watched: dict[str, Watched] = {}

    def run(self, batches: Iterable[Batch]) -> tuple[dict[str, int], dict[str, np.ndarray]]:
        """Each cell's rank, and its A (rank, in).

        Raises:
            InputError: there are no batches, too few tokens in each, or no end to the changes.
        """
        first = next(iter(batches), None)
        if first is None:
            raise InputError("EVA needs batches of data, and there are none")
        self._find_equal_inputs(first)
        self.watched = {
            path: Watched(IncrementalSVD(self.most[path])) for path in self.cells if path not in self.leaders
        }
        ranks = self._until_found(batches)
        return ranks, {path: self._factor(path, rank) for path, rank in ranks.items()}

    def _factor(self, path: str, rank: int) -> np.ndarray:
        svd = self.watched[self.leaders.get(path, path)].svd
        rows = svd.components[:rank]
        return rows / np.sqrt(svd.values[:rank])[:, None] if self.eva.whiten else rows

    def _find_equal_inputs(self, batch: Batch) -> None:
        """Have cells that get the same inputs (query, key and value, say) share one decomposition."""
        digests: dict[str, int] = {}

        def heard(path: str, rows: np.ndarray) -> None:
            if self.most[path] > rows.shape[1]:
                raise InputError(
                    f"EVA: {path!r} has {rows.shape[1]} inputs, too few for {self.most[path]} components "
                    "(its rank times rho)"
                )
            digests[path] = hash(rows.tobytes())

        with self._listening(list(self.cells), batch, heard):
            self.forward(batch)
        missing = [path for path in self.cells if path not in digests]
        if missing:
            raise InputError(f"EVA: the model did not call {missing[0]!r} for the first batch")
        groups: dict[int, list[str]] = {}
        for path in self.cells:
            groups.setdefault(digests[path], []).append(path)
        for leader, *others in groups.values():
            self.leaders |= dict.fromkeys(others, leader)
            most = max(self.most[path] for path in (leader, *others))
            self.most |= dict.fromkeys((leader, *others), most)

    def _until_found(self, batches: Iterable[Batch]) -> dict[str, int]:
        """Run the model until all components that are needed stay the same; return the ranks."""
        ranks = dict(self.most)
        passes = 0
        for number, batch in self._numbered(batches):
            passes += number == 0
            for path, cell in self.watched.items():
                cell.active = not cell.found[: ranks[path]].all()
            if not any(cell.active for cell in self.watched.values()):
                return ranks
            if number == 0 and passes > 1:
                self._check_progress(passes)
            active = [path for path, cell in self.watched.items() if cell.active]
            with self._listening(active, batch, lambda p, rows: self.watched[p].take(rows, self.eva.tau)):
                self.forward(batch)
            if all(cell.svd.components is not None for cell in self.watched.values()):
                ranks = self._shared_out()
        raise AssertionError("the batches go round and round")

    @staticmethod
    def _numbered(batches: Iterable[Batch]) -> Iterator[tuple[int, Batch]]:
        """The batches over and over again, each with its place."""
        while True:
            yield from enumerate(batches)

    def _check_progress(self, passes: int) -> None:
        for path, cell in self.watched.items():
            if cell.svd.components is None:
                raise InputError(
                    f"EVA: {path!r} needs a batch of at least {cell.svd.count} tokens (its rank times rho), "
                    "and there is none; make the batches larger, or the rank or rho smaller"
                )
        if passes > _MOST_PASSES:
            raise InputError(
                f"EVA: after {_MOST_PASSES} passes over the data the components still change by more than "
                f"eva_config.tau={self.eva.tau} allows; lower it, or give more batches"
            )

    def _shared_out(self) -> dict[str, int]:
        """The ranks: as many components as before, those that explain most of their cells' variance."""
        order = [*self.watched, *self.leaders]
        pairs = [
            (path, share)
            for path in order
            for share in self.watched[self.leaders.get(path, path)].svd.ratio[: self.most[path]]
        ]
        largest = np.argsort([-share for _, share in pairs], kind="stable")[: sum(self.ranks.values())]
        counts = Counter(pairs[index][0] for index in largest)
        ranks = {path: counts.get(path, 0) for path in order}
        for path, leader in self.leaders.items():  # the one that is watched gets the most
            if ranks[leader] < ranks[path]:
                ranks[leader], ranks[path] = ranks[path], ranks[leader]
        return ranks

    @contextmanager
    def _listening(
        self, paths: list[str], batch: Batch, heard: Callable[[str, np.ndarray], None]
    ) -> Iterator[None]:
        """Inside, ``heard`` gets the path and the inputs (rows, in) of each cell that is called."""
        mask = token_mask(batch, self.eva.use_label_mask, self.eva.label_mask_value)

        def listener(path: str) -> Callable[..., None]:
            def listen(cell: nn.Cell, inputs: tuple) -> None:
                heard(path, _rows(inputs[0], mask))

            return listen

        handles = [self.cells[path].register_forward_pre_hook(listener(path)) for path in paths]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()


def token_mask(batch: Batch, use_labels: bool, masked: int) -> np.ndarray | None:
    """Which tokens of a batch count, (batch, length) bool; ``None`` for all.

    Args:
        batch: with ``input_ids`` or ``attention_mask``, perhaps with ``labels`` and ``example_mask``.
        use_labels: leave the tokens out that have a label of their own, which is ``masked``.
    """
    columns = {key: np.asarray(value) for key, value in batch.items() if np.ndim(value) > 0}
    tokens = columns.get("attention_mask", columns.get("input_ids"))
    if tokens is None or tokens.ndim != 2:
        return None
    mask = tokens > 0 if "attention_mask" in columns else np.ones(tokens.shape, bool)
    labels = columns.get("labels")
    if use_labels and labels is not None and labels.shape == mask.shape:
        mask &= labels != masked
    if "example_mask" in columns:  # rows that only fill the batch up
        mask &= columns["example_mask"][:, None] > 0
    return mask


def _rows(inputs: Tensor, mask: np.ndarray | None) -> np.ndarray:
    """A cell's inputs as (rows, in) float32: those of the tokens that count, or of their batch's rows."""
    values = inputs.astype(ms.float32).asnumpy()
    if mask is not None and values.shape[:-1] == mask.shape:
        return values[mask]
    if mask is not None and values.ndim == 2 and len(values) == len(mask):
        return values[mask.any(1)]
    return values.reshape(-1, values.shape[-1])
