"""Several adapters in one batch, each row with its own: LoRA by rows, and saved heads by rows.

The tensors of all adapters are stacked, with zeros (or the base model's head) at index 0, and each row
gathers its own. Which row has which adapter is the value of one parameter, so another assignment compiles
nothing.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, Any, ClassVar

import mindspore as ms
import numpy as np
from mindspore import nn, ops

from mindpeft.compiling import forget_compiled_graphs
from mindpeft.errors import InputError, did_you_mean
from mindpeft.parameters import assign
from mindpeft.tuners.base import Site, Tensors, is_linear, is_transposed, original, padded
from mindpeft.tuners.lora import LoraEmbedding, LoraLinear

if TYPE_CHECKING:
    from mindpeft.tuners.adapter import Adapter
    from mindpeft.tuners.bank import AdapterBank

BASE_ROW = "__base__"  # as in PEFT: a row without adapter
MAX_ROWS = 4096


class RowLayer(nn.Cell):
    """A cell that gives each row of a batch its own tensors while ``by_row`` is set; else it steps aside.

    Args:
        base_layer: what is at that place now, layers included.
        row_index: (MAX_ROWS,) int32, shared by all: the stacks' index for each row.
        stacks: tensor name -> (adapters + 1, ...) values.
    """

    TENSORS: ClassVar[tuple[str, ...]]

    def __init__(self, base_layer: nn.Cell, path: str, row_index: ms.Parameter, stacks: Tensors) -> None:
        super().__init__(auto_prefix=False)
        self.base_layer = base_layer
        self.cell = original(base_layer)
        self.row_index = row_index
        self.by_row = False
        self.is_product = False  # see `mindpeft.nn.Linear`
        for name in self.TENSORS:
            stack = stacks.get(name)
            tensor = None if stack is None else ms.Tensor(stack.astype(np.float32))
            parameter = tensor if stack is None else ms.Parameter(tensor, f"{path}.rows.{name}", False)
            setattr(self, name, parameter)

    def of_rows(self, stack: ms.Tensor, rows: int) -> ms.Tensor:
        """Each row's own entry of a stack; runs inside a graph."""
        return ops.gather(stack, self.row_index[:rows], 0)


class RowLoraLinear(RowLayer):
    """LoRA on a linear cell: A (adapters, r, in), B (adapters, out, r) with the scaling in it."""

    TENSORS = ("a", "b", "bias")

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.matmul = ops.BatchMatMul(transpose_b=True)

    @staticmethod
    def tensors_of(site: Site, tensors: Tensors) -> Tensors:
        """An adapter's entries of the stacks."""
        scaling = np.float32(LoraLinear.scaling_of(site))
        found = {"a": tensors["lora_A.weight"], "b": tensors["lora_B.weight"] * scaling}
        if LoraLinear.BIAS in tensors:
            found["bias"] = tensors[LoraLinear.BIAS] * scaling
        return found

    def construct(self, x: ms.Tensor) -> ms.Tensor:
        if not self.by_row:
            return self.base_layer(x)
        result, rows = self.cell(x), x.shape[0]
        hidden = ops.cast(x, ms.float32).reshape((rows, -1, x.shape[-1]))
        update = self.matmul(self.matmul(hidden, self.of_rows(self.a, rows)), self.of_rows(self.b, rows))
        if self.bias is not None:
            update = update + self.of_rows(self.bias, rows).reshape((rows, 1, -1))
        return ops.cast(ops.cast(result, ms.float32) + update.reshape(result.shape), result.dtype)


class RowLoraEmbedding(RowLayer):
    """LoRA on an embedding: A (adapters, vocabulary, r), B (adapters, dim, r) with the scaling in it."""

    TENSORS = ("a", "b")

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.matmul = ops.BatchMatMul(transpose_b=True)

    @staticmethod
    def tensors_of(site: Site, tensors: Tensors) -> Tensors:
        """An adapter's entries of the stacks."""
        a, b = (tensors[name] for name in LoraEmbedding.NAMES)
        return {"a": a.T, "b": b * np.float32(LoraEmbedding.scaling_of(site))}

    def construct(self, ids: ms.Tensor) -> ms.Tensor:
        if not self.by_row:
            return self.base_layer(ids)
        result, rows = self.cell(ids), ids.shape[0]
        vocabulary, rank = self.a.shape[1:]
        starts = (self.row_index[:rows] * vocabulary).reshape((rows,) + (1,) * (ids.ndim - 1))
        columns = ops.gather(self.a.reshape((-1, rank)), (ids + starts).reshape((-1,)), 0)
        update = self.matmul(columns.reshape((rows, -1, rank)), self.of_rows(self.b, rows))
        return ops.cast(ops.cast(result, ms.float32) + update.reshape(result.shape), result.dtype)


class RowHead(RowLayer):
    """A linear cell that adapters save whole: weight (adapters, out, in), bias (adapters, out)."""

    TENSORS = ("weight", "bias")

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.matmul = ops.BatchMatMul(transpose_b=True)

    def construct(self, x: ms.Tensor) -> ms.Tensor:
        if not self.by_row:
            return self.base_layer(x)
        rows = x.shape[0]
        hidden = ops.cast(x, ms.float32).reshape((rows, -1, x.shape[-1]))
        result = self.matmul(hidden, self.of_rows(self.weight, rows))
        if self.bias is not None:
            result = result + self.of_rows(self.bias, rows).reshape((rows, 1, -1))
        return ops.cast(result.reshape((*x.shape[:-1], result.shape[-1])), x.dtype)


ROW_LAYERS = {LoraLinear: RowLoraLinear, LoraEmbedding: RowLoraEmbedding}


class MixedBatch(nn.Cell):
    """Calls a model with an adapter for each row of the batch.

    Args:
        bank: the model's adapters.
    """

    def __init__(self, bank: AdapterBank) -> None:
        super().__init__(auto_prefix=False)
        self.model = bank.base.model
        self.row_index = ms.Parameter(ms.Tensor(np.zeros(MAX_ROWS, np.int32)), "rows.index", False)
        self._bank = bank
        self._layers: dict[str, RowLayer] = {}
        self._loaded: dict[str, Tensors] = {}
        self._state: Any = None

    def construct(self, *args: Any, **kwargs: Any) -> Any:
        """Call the model; use ``run``."""
        return self.model(*args, **kwargs)

    def run(self, names: Sequence[str | None], args: tuple, kwargs: Mapping[str, Any]) -> Any:
        """Call the model with these adapters for the rows of its inputs.

        Args:
            names: an adapter's name for each row, ``"__base__"`` or ``None`` for none.
            args, kwargs: the model's.

        Raises:
            InputError: see `assigned`.
        """
        rows = next((v.shape[0] for v in (*args, *kwargs.values()) if isinstance(v, ms.Tensor)), 0)
        with self.assigned(names, rows):
            return self(*args, **kwargs)

    @contextmanager
    def assigned(self, names: Sequence[str | None], rows: int) -> Iterator[None]:
        """Within it, calls of this cell take these adapters for the rows of their inputs.

        Raises:
            InputError: an unknown name, not one name for each row, an adapter whose method can't be mixed, or
                a model that is being trained.
        """
        self._check(names, rows)
        adapters = {name: a for name, a in self._bank.adapters.items() if not obstacle(a, self._bank)}
        self._prepare(adapters)
        order = {None: 0, BASE_ROW: 0, **{name: i for i, name in enumerate(adapters, 1)}}
        index = np.zeros(MAX_ROWS, np.int32)
        index[: len(names)] = [order[name] for name in names]
        assign(self.row_index, index)
        plain = all(name in adapters for name in self._bank.active)
        with nullcontext() if plain else self._bank.disabled(), self._by_row():
            yield

    @contextmanager
    def _by_row(self) -> Iterator[None]:
        for layer in self._layers.values():
            layer.by_row = True
        try:
            yield
        finally:
            for layer in self._layers.values():
                layer.by_row = False

    @property
    def config(self) -> Any:
        """The model's."""
        return self.model.config

    def _check(self, names: Sequence[str | None], rows: int) -> None:
        bank = self._bank
        bank.require_plain("mix adapters in a batch")
        if self.model.training:
            raise InputError("adapter_names is for inference; call set_train(False) first")
        if len(names) != rows or rows > MAX_ROWS:
            raise InputError(
                f"adapter_names has {len(names)} names for a batch of {rows} rows (at most {MAX_ROWS})"
            )
        for name in set(names) - {None, BASE_ROW}:
            if name not in bank.adapters:
                known = ", ".join(map(repr, (*bank.adapters, BASE_ROW)))
                near = did_you_mean(name, bank.adapters)
                raise InputError(f"adapter_names: no adapter {name!r}{near}; there are: {known}")
            problem = obstacle(bank.adapters[name], bank)
            if problem:
                raise InputError(f"adapter_names: the adapter {name!r} {problem}")

    def _prepare(self, adapters: Mapping[str, Adapter]) -> None:
        """Put row layers in for the adapters that there are now, and load what changed since."""
        bank = self._bank
        bank.write_back()
        stacks = self._stacks(list(adapters.values()))
        state = (bank.rack.version, tuple(map(id, adapters.values())))
        if state != self._state:
            self._layers = {path: self._row_layer(path, values) for path, values in stacks.items()}
            for path, layer in self._layers.items():
                bank.rack.replace(path, layer.set_train(False))
            forget_compiled_graphs()
            self._state = state
        else:
            for path, values in stacks.items():
                for name, value in values.items():
                    if not np.array_equal(value, self._loaded[path][name]):
                        assign(getattr(self._layers[path], name), value)
        self._loaded = stacks

    def _row_layer(self, path: str, stacks: Tensors) -> RowLayer:
        outermost = self._bank.rack.outermost(path)
        if "a" in stacks and "weight" in stacks:
            raise InputError(f"adapter_names: {path!r} has LoRA in one adapter and is saved whole in another")
        lora = RowLoraLinear if is_linear(original(outermost)) else RowLoraEmbedding
        return (lora if "a" in stacks else RowHead)(outermost, path, self.row_index, stacks)

    def _stacks(self, adapters: list[Adapter]) -> dict[str, Tensors]:
        """Path -> tensor name -> the stacked values of the adapters, the base model's at index 0."""
        entries: dict[str, list[Tensors]] = {}
        for number, adapter in enumerate(adapters, 1):
            for part in adapter.parts:
                for path, kind in part.plan.classes.items():
                    row = entries.setdefault(path, [{} for _ in range(len(adapters) + 1)])
                    row[number] = ROW_LAYERS[kind].tensors_of(part.plan.sites[path], part.tensors[path])
        stacks = {path: _stacked(rows) for path, rows in entries.items()}
        for key in sorted(set().union(*(adapter.copies for adapter in adapters))):
            path, _, leaf = key.rpartition(".")
            own = self._bank.own_value(key)
            values = [own, *(adapter.overrides.get(key, own) for adapter in adapters)]
            stacks.setdefault(path, {})[leaf] = np.stack(values)
        return stacks


def _stacked(rows: list[Tensors]) -> Tensors:
    """One array for each tensor name: all rows' values, padded with zeros to the largest."""
    names = {name: None for row in rows for name in row}
    result = {}
    for name in names:
        shape = tuple(np.max([row[name].shape for row in rows if name in row], axis=0))
        result[name] = np.stack([padded(row.get(name), shape) for row in rows]).astype(np.float32)
    return result


def obstacle(adapter: Adapter, bank: AdapterBank) -> str | None:
    """Why an adapter can't be mixed by rows, if it can't: it has more than LoRA and saved linear heads."""
    kinds = [kind for part in adapter.parts for kind in part.plan.classes.values()]
    if adapter.takes_out:
        return "takes a part out of the base model's weights, which the other rows need"
    odd = next((kind for kind in kinds if kind not in ROW_LAYERS), None)
    if odd:
        return f"has {odd.__name__}; only LoRA on linear and embedding cells can be mixed by rows"
    if len(kinds) > len({path for part in adapter.parts for path in part.plan.classes}):
        return "is a hybrid whose parts share cells; such adapters can't be mixed by rows"
    heads = {key.rpartition(".")[0] for key in adapter.copies}
    for key in adapter.overrides:
        path = key.rpartition(".")[0]
        if path not in heads or not is_linear(bank.base.cells[path]) or is_transposed(bank.base.cells[path]):
            return f"changes {key!r} of the base model; only saved linear heads can be mixed by rows"
    return None
