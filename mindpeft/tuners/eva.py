"""EVA: LoRA's A begins with the directions in which a cell's inputs vary most, and the ranks follow.

Paischer et al. 2024, "One Initialization to Rule them All: Fine-tuning via Explained Variance Adaptation".
The model runs over batches of the training data; an incremental decomposition of each cell's inputs goes on
until the components that the cell will have stay the same from batch to batch. The ranks of all cells
together remain what they were: the components that explain most of their cell's variance are taken.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import mindspore as ms
import numpy as np
from mindspore import Tensor, nn

from mindpeft.errors import InputError
from mindpeft.ops.cpu.library import without_kernels
from mindpeft.targets import pattern_value
from mindpeft.tuners.adapter import Part
from mindpeft.tuners.base import Tensors
from mindpeft.tuners.eva_survey import Batch, Survey
from mindpeft.tuners.lora_conv import LoraConv2d
from mindpeft.tuners.lora_layers import LoraLayer, LoraLinear
from mindpeft.tuners.lora_parameter import LoraParameters

if TYPE_CHECKING:
    from mindpeft.peft_model import PeftModel


@contextmanager
def _graphless(model: nn.Cell) -> Iterator[None]:
    """Inside, the model runs without a graph (where hooks are heard) and for inference."""
    mode, training = ms.get_context("mode"), model.training
    ms.set_context(mode=ms.PYNATIVE_MODE)
    model.set_train(False)
    try:
        yield
    finally:
        model.set_train(training)
        ms.set_context(mode=mode)


def initialize_lora_eva_weights(
    model: PeftModel,
    dataloader: Iterable[Batch],
    adapter_name: str = "default",
    forward_fn: Callable[[nn.Cell, Batch], Any] | None = None,
) -> None:
    """Begin a fresh adapter of ``init_lora_weights="eva"`` with what its cells' inputs are like.

    Ranks are shared out anew: the adapter's config gets ``rank_pattern``, ``alpha_pattern`` and
    ``target_modules`` accordingly, and cells of rank 0 are adapted no longer. Embeddings begin as ordinary
    LoRA. The slots are made anew, so make the optimizer after this. Unlike in PEFT, labels that aren't the
    tokens' own are no mask, inputs without an axis of tokens count by rows, and ``whiten`` divides once also
    where cells have equal inputs.

    Args:
        model: the adapter is the only active one.
        dataloader: batches of a model's arguments by name, as arrays or Tensors, gone through again and
            again; or a ``mindspore.dataset.Dataset`` of such batches.
        adapter_name: the adapter.
        forward_fn: called with the model and a batch; default: calls the model with those of the batch's
            columns that it takes, without ``labels``.

    Raises:
        InputError: no such adapter, another initialisation, or data that don't do.
    """
    bank = model._bank
    bank.require(adapter_name)
    if bank.active != [adapter_name]:
        raise InputError(
            f"EVA needs {adapter_name!r} to be the only active adapter; active: {', '.join(bank.active)}"
        )
    parts = [part for part in bank.adapters[adapter_name].parts if part.trainable and _is_eva(part)]
    if not parts:
        raise InputError(f'{adapter_name!r} is no fresh adapter with init_lora_weights="eva"')
    if hasattr(dataloader, "create_dict_iterator"):
        dataloader = list(dataloader.create_dict_iterator(num_epochs=1, output_numpy=True))
    elif iter(dataloader) is dataloader:
        dataloader = list(dataloader)
    run = forward_fn or _call
    for part in parts:
        cells = {path: bank.base.cells[path] for path, kind in part.plan.classes.items() if _has_inputs(kind)}
        survey = Survey(lambda batch: run(model, batch), cells, part.plan.config)
        # A kernel for the cell and its LoRA would not call the cell, on which the survey listens.
        with bank.disabled(), _graphless(model), without_kernels(model):
            ranks, factors = survey.run(dataloader)
        _install(model, adapter_name, part, ranks, factors)


def _is_eva(part: Part) -> bool:
    return getattr(part.plan.config, "init_lora_weights", None) == "eva"


def _has_inputs(kind: type) -> bool:
    """Whether a layer multiplies its inputs by A."""
    return issubclass(kind, LoraLinear) and not issubclass(kind, LoraConv2d)


def _call(model: PeftModel, batch: Batch) -> None:
    accepted = inspect.signature(model.get_base_model().construct).parameters
    columns = {key: value for key, value in batch.items() if key in accepted and key != "labels"}
    model(**{key: v if isinstance(v, Tensor) else Tensor(v) for key, v in columns.items()})


def _install(
    model: PeftModel, name: str, part: Part, ranks: Mapping[str, int], factors: Mapping[str, np.ndarray]
) -> None:
    """Give an adapter's part those ranks and A's."""
    config, plan = part.plan.config, part.plan
    wrapped = [
        path
        for path, kind in plan.classes.items()
        if issubclass(kind, LoraLayer) and not issubclass(kind, LoraParameters)
    ]
    kept = [path for path in wrapped if ranks.get(path, 1)]
    rank_pattern, alpha_pattern = {}, {}
    for path in kept:
        before = pattern_value(config.rank_pattern, path, config.r)
        alpha = pattern_value(config.alpha_pattern, path, config.lora_alpha)
        rank = ranks.get(path, before)
        if config.eva_config.adjust_scaling_factors and rank != before:
            alpha *= rank / before
        rank_pattern |= {path: rank} if rank != config.r else {}
        alpha_pattern |= {path: alpha} if alpha != config.lora_alpha else {}
    changed = replace(
        config, target_modules=set(kept), rank_pattern=rank_pattern, alpha_pattern=alpha_pattern
    )
    given: dict[str, Tensors] = {
        path: {LoraLinear.NAMES[0]: a} for path, a in factors.items() if path in kept
    }
    model._bank.remake(name, part, changed, given)
