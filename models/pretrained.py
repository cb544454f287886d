"""What every backbone shares: building from a checkpoint folder, fresh weights, writing back."""

from __future__ import annotations

import os
from typing import Any, ClassVar

import mindspore as ms
import numpy as np
from mindspore import Tensor

from mindpeft.compiling import CompiledCell
from mindpeft.console import logger
from mindpeft.convert.checkpoint import open_checkpoint
from mindpeft.convert.loader import LoadReport, hf_renamer, load_weights, parameter_places
from mindpeft.convert.tensors import LazyTensor
from mindpeft.convert.writer import save_checkpoint
from mindpeft.errors import InputError, did_you_mean
from mindpeft.int8 import INT8, check_int8, has_int8, int8_tensors, use_int8
from mindpeft.memory import release_freed_memory, tune_heap
from mindpeft.models.config import PretrainedConfig, read_config
from mindpeft.nn import LayerNorm, RMSNorm, lookup_tables
from mindpeft.nn.checkpointing import is_checkpointing, set_checkpointing
from mindpeft.precision import keep_less, needs_widening, parameter_dtypes

DTYPES = {"float32": ms.float32, "float16": ms.float16, "bfloat16": ms.bfloat16}


class PreTrainedModel(CompiledCell):
    """A backbone or a backbone with a head, whose parameters carry the names of its Hugging Face checkpoint.

    Attributes:
        config_class: the architecture's configuration.
        base_model_prefix: the attribute that holds the backbone in a model with a head.
        ignored_on_load: regular expressions of tensors that a checkpoint may hold without use here.
        load_report: what :meth:`from_pretrained` loaded, None for a model from :meth:`from_config`.
    """

    config_class: ClassVar[type[PretrainedConfig]]
    base_model_prefix: ClassVar[str] = ""
    ignored_on_load: ClassVar[tuple[str, ...]] = ()
    NOT_IN_GRAPH: ClassVar[tuple[str, ...]] = ("load_report",)  # see `mindpeft.structure`

    def __init__(self, config: PretrainedConfig):
        super().__init__()
        self.config = config
        self.load_report: LoadReport | None = None

    @classmethod
    def from_config(cls, config: PretrainedConfig) -> PreTrainedModel:
        """Return a model with fresh random weights, drawn from NumPy's generator (``mindspore.set_seed``)."""
        model = cls(config)
        model.init_weights()
        model.set_train(False)  # also names the compile phase: a Cell is born in that of training
        return model

    @classmethod
    def from_pretrained(
        cls,
        folder: str | os.PathLike,
        *,
        dtype: str = "float32",
        ignore_mismatched_sizes: bool = False,
        **overrides: Any,
    ) -> PreTrainedModel:
        """Build the model that a Hugging Face checkpoint folder describes and load its weights.

        Args:
            folder: holds config.json and model.safetensors, pytorch_model.bin, or their shards.
            dtype: of the parameters: ``float32``, ``float16``, ``bfloat16``, or ``auto`` for the one that
                config.json names. On the CPU ``bfloat16`` is for matrices alone: see
                `mindpeft.precision.parameter_dtypes`. ``int8``, on the CPU alone, is for the weights of the
                backbone's linear layers, which can't be trained or merged into; other matrices are then
                bfloat16: see `mindpeft.int8.use_int8`.
            ignore_mismatched_sizes: initialise a tensor of another shape afresh instead of refusing it.
            overrides: keys of the configuration, such as ``num_labels=77``.

        Returns:
            The model, not in training mode; ``model.load_report`` tells what was loaded, and is logged.

        Raises:
            InputError: the folder, its files or an override can't be used.
        """
        if dtype == INT8:
            check_int8()
        tune_heap()
        values = read_config(folder)
        config = cls.config_class.from_dict(values, name_or_path=str(folder), **overrides)
        with open_checkpoint(folder) as checkpoint:
            model = cls(config)
            rename = hf_renamer(parameter_places(model), cls.base_model_prefix)
            held = {rename(name): checkpoint.info(name).shape for name in checkpoint.names()}
            int8 = use_int8(model, cls.base_model_prefix, held) if dtype == INT8 else {}
            others = ms.bfloat16 if int8 else _dtype(dtype, values, INT8)
            report = load_weights(
                model,
                checkpoint,
                rename=rename,
                ignore_unexpected=cls.ignored_on_load,
                ignore_mismatched_sizes=ignore_mismatched_sizes,
                dtype=parameter_dtypes(model, others, held),
                int8=int8,
                by_rows=lookup_tables(model),
            )
        if needs_widening(others):
            keep_less(model)
        release_freed_memory()
        model.init_weights({*report.newly_initialised, *report.misshapen})
        model.load_report = report
        model.set_train(False)
        logger.info("%s: %s", cls.__name__, report)
        return model

    def init_weights(self, names: set[str] | None = None) -> None:
        """Fill parameters as Hugging Face does: normal(0, initializer_range), zero biases, norms 1 and 0.

        Args:
            names: the parameters to fill; None for all.
        """
        std = getattr(self.config, "initializer_range", 0.02)
        done: set[int] = set()  # a tied parameter is filled where it stands first
        for path, cell in self.cells_and_names():
            for leaf, parameter in cell.parameters_and_names(expand=False):
                name = f"{path}.{leaf}" if path else leaf
                if id(parameter) in done or (names is not None and name not in names):
                    continue
                done.add(id(parameter))
                value = np.zeros(parameter.shape, np.float32)
                if leaf == "weight" and isinstance(cell, LayerNorm | RMSNorm):
                    value[:] = 1.0 - getattr(cell, "offset", 0.0)
                elif leaf == "weight":
                    value[:] = np.random.standard_normal(parameter.shape) * std
                    if getattr(cell, "padding_idx", None) is not None:
                        value[cell.padding_idx] = 0.0
                parameter.set_data(Tensor(value).astype(parameter.dtype))

    def gradient_checkpointing_enable(self, gradient_checkpointing_kwargs: dict | None = None) -> None:
        """Train with less memory and more time: layers are computed again in the backward pass.

        Args:
            gradient_checkpointing_kwargs: Hugging Face's; there is nothing to choose here.

        Raises:
            InputError: the model has no layers.
        """
        set_checkpointing(self, True)

    def gradient_checkpointing_disable(self) -> None:
        """Keep what the backward pass needs of every layer, as before `gradient_checkpointing_enable`."""
        set_checkpointing(self, False)

    @property
    def is_gradient_checkpointing(self) -> bool:
        """Whether layers are computed again in the backward pass."""
        return is_checkpointing(self)

    def save_pretrained(
        self, folder: str | os.PathLike, *, dtype: str | None = None, max_shard_size: str = "5GB"
    ) -> None:
        """Write config.json and model.safetensors (or shards) that ``transformers`` opens.

        Args:
            folder: made if absent; an earlier checkpoint in it is replaced.
            dtype: of the file's floating-point tensors; None for the parameters' own, and for float32
                where some are int8, of which the numbers are written that they stand for.
            max_shard_size: a larger model is split, such as ``"5GB"``.
        """
        target = None if dtype is None else _dtype(dtype, {})
        if target is None and has_int8(self):
            target = ms.float32
        replaced = int8_tensors(self, target)
        tensors = [
            (name, replaced[id(parameter)] if id(parameter) in replaced else _written(parameter, target))
            for name, parameter in self.parameters_and_names()
        ]
        save_checkpoint(
            folder, [named for named in tensors if named[1] is not None], max_shard_size=max_shard_size
        )
        self.config.extra["architectures"] = [type(self).__name__]
        self._note_dtype(target)
        self.config.save_pretrained(folder)

    def _note_dtype(self, written: ms.Type | None) -> None:
        """Let the configuration name the dtype of the file: the one asked for, or that of most numbers."""
        if written is None:
            written = max(DTYPES.values(), key=self._numbers_of)
        name = next(name for name, dtype in DTYPES.items() if dtype == written)
        keys = self.config.extra.keys() & {"dtype", "torch_dtype"} or {"dtype"}
        self.config.extra.update(dict.fromkeys(keys, name))

    def _numbers_of(self, dtype: ms.Type) -> int:
        return sum(parameter.size for parameter in self.get_parameters() if parameter.dtype == dtype)


def _written(parameter: ms.Parameter, dtype: ms.Type | None) -> LazyTensor:
    """A parameter for the file, in a dtype if it is of floating-point numbers."""
    return LazyTensor.from_parameter(parameter, dtype if parameter.dtype in DTYPES.values() else None)


def _dtype(name: str, config: dict[str, Any], *further: str) -> ms.Type:
    """The dtype of a name; an error tells of the further ones too."""
    if name == "auto":
        name = config.get("dtype") or config.get("torch_dtype") or "float32"
    if name not in DTYPES:
        known = (*DTYPES, *further)
        raise InputError(
            f"unknown dtype {name!r}; known: auto, {', '.join(known)}{did_you_mean(name, known)}"
        )
    return DTYPES[name]
