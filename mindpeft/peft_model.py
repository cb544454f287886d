"""PeftModel: a model with adapters injected, switched, disabled, merged, saved and loaded."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mindspore import nn

from mindpeft import adapter_files
from mindpeft.config import PeftConfig
from mindpeft.errors import InputError
from mindpeft.tuners.bank import AdapterBank
from mindpeft.tuners.base import TunerLayer


class PeftModel(nn.Cell):
    """A model with adapters; make it with ``get_peft_model`` or ``PeftModel.from_pretrained``.

    It is called like the model inside, and passes attributes it doesn't have on to it (``model.config``). The
    base model's parameters are frozen and keep their names. While no adapter is active (``disable_adapter``)
    it computes exactly what the base model does, trained biases and saved heads included.
    """

    def __init__(self, model: nn.Cell, autocast_adapter_dtype: bool = True) -> None:
        if any(isinstance(cell, PeftModel | TunerLayer) for _, cell in model.cells_and_names()):
            raise InputError(
                "the model has adapters already; use add_adapter on its PeftModel, or unload() it first"
            )
        super().__init__(auto_prefix=False)
        self._bank = AdapterBank(model, autocast_adapter_dtype)
        self.base_model = model
        # A cell is born in the phase "train" whatever its `training`, and graphs are kept by phase: set_train
        # would then find the inference graph.
        self.add_flags(training=model.training)
        self.phase = "train" if model.training else "predict"

    def construct(self, *args: Any, **kwargs: Any) -> Any:
        """Call the model inside."""
        return self.base_model(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "base_model" or name.startswith("__"):
                raise
            return getattr(self.base_model, name)

    @classmethod
    def from_pretrained(
        cls,
        model: nn.Cell,
        folder: str | os.PathLike,
        adapter_name: str = "default",
        is_trainable: bool = False,
        config: PeftConfig | None = None,
        autocast_adapter_dtype: bool = True,
    ) -> PeftModel:
        """Put the adapter of a folder into a model.

        Args:
            model: the base model; changed in place.
            folder: holds ``adapter_config.json`` and ``adapter_model.safetensors`` or ``adapter_model.bin``.
            adapter_name: what to call it.
            is_trainable: go on training it; else everything is frozen and the model put in inference mode.
            config: used instead of the folder's.
            autocast_adapter_dtype: keep the adapter in float32 over a half-precision model.

        Raises:
            InputError: the folder's files are missing or damaged, or don't fit the model, which is then as it
                was.
        """
        _refuse_odd_name(adapter_name)
        config = config or PeftConfig.from_pretrained(folder)
        tensors = adapter_files.read_tensors(folder)
        peft_model = cls(model, autocast_adapter_dtype)
        peft_model._add(adapter_name, config, tensors, is_trainable, None, folder)
        if not is_trainable:
            peft_model.set_train(False)
        return peft_model

    # Adapters ---------------------------------------------------------------------------------------------

    @property
    def active_adapter(self) -> str | None:
        """The name of the adapter in the slots."""
        return self._bank.active

    @property
    def peft_config(self) -> dict[str, PeftConfig]:
        """The config of each adapter, with its targets resolved."""
        return {name: adapter.plan.config for name, adapter in self._bank.adapters.items()}

    @property
    def targeted_module_names(self) -> list[str]:
        """The paths of the wrapped cells."""
        return list(self._bank.layers)

    def add_adapter(self, adapter_name: str, peft_config: PeftConfig, slot_rank: int | None = None) -> None:
        """Add a fresh adapter; it does not become the active one.

        Graphs are compiled anew only if a cell is wrapped for the first time or a slot must grow. A slot that
        grows gets new parameters, so make the optimizer after that.

        Args:
            adapter_name: a new name.
            peft_config: what it is.
            slot_rank: keep room in the slots for adapters of up to this rank.

        Raises:
            InputError: the name is taken, or the config does not fit the model, which is then as it was.
        """
        _refuse_odd_name(adapter_name)
        self._add(adapter_name, peft_config, None, not peft_config.inference_mode, slot_rank)

    def load_adapter(self, folder: str | os.PathLike, adapter_name: str, is_trainable: bool = False) -> None:
        """Add the adapter of a folder; it does not become the active one.

        Raises:
            InputError: the files are missing or damaged, or don't fit the model, which is then as it was.
        """
        _refuse_odd_name(adapter_name)
        config = PeftConfig.from_pretrained(folder)
        self._add(adapter_name, config, adapter_files.read_tensors(folder), is_trainable, None, folder)

    def _add(
        self,
        name: str,
        config: PeftConfig,
        tensors: dict | None,
        trainable: bool,
        slot_rank: int | None,
        source: str | os.PathLike | None = None,
    ) -> None:
        try:
            plan = self._bank.plan(config)
            plan.config.inference_mode = not trainable
            self._bank.add(name, plan, tensors, trainable, slot_rank)
        except InputError as error:
            raise (InputError(f"{source}: {error}") if source else error) from error

    def set_adapter(self, adapter_name: str) -> None:
        """Make an adapter the active one, trainable if it was added so.

        Only parameter values change, so nothing recompiles (but training with another ``lora_dropout`` does).

        Raises:
            InputError: there is no such adapter, or one is merged.
        """
        self._bank.activate(adapter_name)

    def delete_adapter(self, adapter_name: str) -> None:
        """Forget an adapter; if it was active, the first of the others becomes active.

        Raises:
            InputError: there is no such adapter, or one is merged.
        """
        self._bank.delete(adapter_name)

    @contextmanager
    def disable_adapter(self) -> Iterator[None]:
        """Context manager: inside, the model is the base model. Nothing recompiles.

        Unlike in PEFT, that holds for trained biases too: the base model's own values stand in for them.
        """
        with self._bank.disabled():
            yield

    # Merging ----------------------------------------------------------------------------------------------

    def merge_adapter(self, adapter_names: list[str] | None = None, safe_merge: bool = False) -> None:
        """Add adapters to the base weights (in float32, rounded once) and switch the slots off.

        Args:
            adapter_names: default: the active one.
            safe_merge: refuse, before anything is changed, if a result would not be finite.

        Raises:
            InputError: an unknown name, a merge in place already, or values that are not finite.
        """
        self._bank.merge(adapter_names, safe_merge)

    def unmerge_adapter(self) -> None:
        """Restore the weights from before ``merge_adapter``, bit by bit, if something is merged."""
        if self._bank.merged:
            self._bank.unmerge()

    def merge_and_unload(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> nn.Cell:
        """Merge, take the layers out, and return the bare model, with the active adapter's biases and heads.

        Raises:
            InputError: as ``merge_adapter``.
        """
        self.unmerge_adapter()
        self._bank.merge(adapter_names, safe_merge, keep=False)
        return self._bank.unload(keep_values=True)

    def unload(self) -> nn.Cell:
        """Take the layers out without merging and return the base model exactly as it was.

        Unlike in PEFT, trained heads and biases go too.
        """
        self.unmerge_adapter()
        return self._bank.unload(keep_values=False)

    def get_base_model(self) -> nn.Cell:
        """The model inside, with its layers wrapped as they are."""
        return self.base_model

    # Files and numbers ------------------------------------------------------------------------------------

    def save_pretrained(
        self, save_directory: str | os.PathLike, selected_adapters: list[str] | None = None
    ) -> None:
        """Write adapters in PEFT's format: "default" into the folder itself, others into sub-folders.

        Args:
            save_directory: made if absent.
            selected_adapters: default: all.

        Raises:
            InputError: an unknown name, or the folder can't be written.
        """
        names = list(self._bank.adapters) if selected_adapters is None else selected_adapters
        for name, tensors in [(name, self._bank.export(name)) for name in names]:
            config = self.peft_config[name]
            config.base_model_name_or_path = config.base_model_name_or_path or self._base_name()
            if config.task_type is None:
                config.auto_mapping = self._auto_mapping()
            adapter_files.write_adapter(adapter_files.adapter_folder(save_directory, name), config, tensors)

    def _base_name(self) -> str | None:
        model = self.base_model
        own = getattr(model, "name_or_path", None) or getattr(
            getattr(model, "config", None), "name_or_path", None
        )
        return str(own) if own else None

    def _auto_mapping(self) -> dict[str, str]:
        """The base model's class as PEFT writes it; ours bear the names of transformers' classes."""
        model = self.base_model
        library = (
            "transformers"
            if hasattr(getattr(model, "config", None), "model_type")
            else type(model).__module__
        )
        return {"base_model_class": type(model).__name__, "parent_library": library}

    def get_nb_trainable_parameters(self) -> tuple[int, int]:
        """(trainable, all) numbers of parameters; adapters count in their true ranks, as in PEFT."""
        return self._bank.count()

    def print_trainable_parameters(self) -> None:
        """Print those numbers and the percentage."""
        trainable, everything = self.get_nb_trainable_parameters()
        share = 100 * trainable / everything
        print(f"trainable params: {trainable:,d} || all params: {everything:,d} || trainable%: {share:.4f}")


def get_peft_model(
    model: nn.Cell,
    peft_config: PeftConfig,
    adapter_name: str = "default",
    autocast_adapter_dtype: bool = True,
    slot_rank: int | None = None,
) -> PeftModel:
    """Put a fresh adapter into a model.

    Args:
        model: any ``mindspore.nn.Cell``; changed in place: cells wrapped, parameters frozen.
        peft_config: the method and its targets.
        adapter_name: what to call the adapter.
        autocast_adapter_dtype: keep the adapter in float32 over a half-precision model.
        slot_rank: keep room for adapters of up to this rank, so that adding one recompiles nothing.

    Returns:
        the model with its adapter active and trainable (unless ``peft_config.inference_mode``).

    Raises:
        InputError: the model has adapters already, or the config does not fit it; nothing is changed then.
    """
    peft_model = PeftModel(model, autocast_adapter_dtype)
    peft_model.add_adapter(adapter_name, peft_config, slot_rank)
    return peft_model


def _refuse_odd_name(name: str) -> None:
    """An adapter's name becomes a folder's."""
    if not name or name in (".", "..") or Path(name).name != name:
        raise InputError(f"{name!r} can't name an adapter: it must be usable as a folder name")
