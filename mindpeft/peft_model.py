"""PeftModel: a model with adapters injected, switched, disabled, merged, saved and loaded."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, ClassVar

from mindspore import nn

from mindpeft import adapter_files
from mindpeft.compiling import CompiledCell
from mindpeft.config import PeftConfig
from mindpeft.errors import InputError
from mindpeft.status import AdapterReports
from mindpeft.tuners.bank import AdapterBank
from mindpeft.tuners.base import Slot
from mindpeft.tuners.hooks import TrainingHook

if TYPE_CHECKING:
    from mindpeft.tuners.adapter_fusion import AdapterFusionConfig


class PeftModel(AdapterReports, CompiledCell):
    """A model with adapters; make it with ``get_peft_model`` or ``PeftModel.from_pretrained``.

    It is called like the model inside, and passes attributes it doesn't have on to it (``model.config``). The
    base model's parameters are frozen and keep their names. While no adapter is active (``disable_adapter``)
    it computes exactly what the base model does, trained biases and saved heads included.
    """

    NOT_IN_GRAPH: ClassVar[tuple[str, ...]] = ("_bank", "_mixed")  # see `mindpeft.structure`

    def __init__(self, model: nn.Cell, autocast_adapter_dtype: bool = True) -> None:
        if any(isinstance(cell, PeftModel | Slot) for _, cell in model.cells_and_names()):
            raise InputError(
                "the model has adapters already; use add_adapter on its PeftModel, or unload() it first"
            )
        super().__init__(auto_prefix=False)
        self.base_model = model
        self._bank = AdapterBank(model, self, autocast_adapter_dtype)
        self._mixed: Any = None
        # A cell is born in the phase "train" whatever its `training`, and graphs are kept by phase: set_train
        # would then find the inference graph.
        self.add_flags(training=model.training)
        self.phase = "train" if model.training else "predict"

    def construct(self, *args: Any, **kwargs: Any) -> Any:
        """Call the model inside."""
        return self.base_model(*args, **kwargs)

    def __call__(self, *args: Any, adapter_names: Sequence[str | None] | None = None, **kwargs: Any) -> Any:
        """Call the model inside, with the active adapters or with one adapter for each row of the batch.

        Args:
            adapter_names: the adapter of each row; ``None`` or ``"__base__"`` for the base model. For LoRA on
                linear and embedding cells and saved linear heads, in inference. Another assignment compiles
                nothing; an adapter added since does.
            args, kwargs: the model's.

        Raises:
            InputError: not one known name for each row, or an adapter that can't be mixed by rows.
        """
        if adapter_names is None:
            return super().__call__(*args, **kwargs)
        return self._mixed_batch().run(adapter_names, args, kwargs)

    def _mixed_batch(self) -> Any:
        if self._mixed is None:
            from mindpeft.tuners.mixed import MixedBatch

            object.__setattr__(self, "_mixed", MixedBatch(self._bank))  # not a child: it holds the model too
        return self._mixed

    def generate(
        self,
        input_ids: Any,
        attention_mask: Any = None,
        adapter_names: Sequence[str | None] | None = None,
        **arguments: Any,
    ) -> Any:
        """Write on behind prompts with the active adapters, or with one adapter for each prompt.

        Args:
            adapter_names: as in a call.
            input_ids, attention_mask, arguments: see `mindpeft.generate.generate`.
        """
        from mindpeft.generate import generate, rows_per_prompt

        if adapter_names is None:
            return generate(self, input_ids, attention_mask, **arguments)
        mixed = self._mixed_batch()
        copies = rows_per_prompt(self, **arguments)
        names = [name for name in adapter_names for _ in range(copies)]
        with mixed.assigned(names, copies * len(input_ids)):
            return generate(mixed, input_ids, attention_mask, **arguments)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name in ("base_model", "_bank") or name.startswith("__"):
                raise
            return getattr(self._bank.base.model, name)

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
            config: used instead of the folder's (of an adapter with one method).
            autocast_adapter_dtype: keep the adapter in float32 over a half-precision model.

        Raises:
            InputError: the folder's files are missing or damaged, or don't fit the model, which is then as it
                was.
        """
        adapter_files.check_adapter_name(adapter_name)
        configs, tensors = adapter_files.read_adapter(folder)
        peft_model = cls(model, autocast_adapter_dtype)
        peft_model._add(
            adapter_name, configs if config is None else [config], tensors, is_trainable, source=folder
        )
        if not is_trainable:
            peft_model.set_train(False)
        return peft_model

    # Adapters ---------------------------------------------------------------------------------------------

    def add_adapter(
        self, adapter_name: str, peft_config: PeftConfig | list[PeftConfig], slot_rank: int | None = None
    ) -> None:
        """Add a fresh adapter; it does not become the active one.

        Graphs are compiled anew only if a cell is wrapped for the first time or a slot must grow. A slot that
        grows gets new parameters, so make the optimizer after that.

        Args:
            adapter_name: a new name.
            peft_config: what it is; several configs make one hybrid adapter.
            slot_rank: keep room in the slots for adapters of up to this rank.

        Raises:
            InputError: the name is taken, or the config does not fit the model, which is then as it was.
        """
        adapter_files.check_adapter_name(adapter_name)
        configs = peft_config if isinstance(peft_config, list) else [peft_config]
        if not configs:
            raise InputError("a hybrid needs at least one config, and the list is empty")
        trainable = not any(config.inference_mode for config in configs)
        self._add(adapter_name, configs, None, trainable, slot_rank)

    def load_adapter(self, folder: str | os.PathLike, adapter_name: str, is_trainable: bool = False) -> None:
        """Add the adapter of a folder; it does not become the active one.

        Raises:
            InputError: the files are missing or damaged, or don't fit the model, which is then as it was.
        """
        adapter_files.check_adapter_name(adapter_name)
        configs, tensors = adapter_files.read_adapter(folder)
        self._add(adapter_name, configs, tensors, is_trainable, source=folder)

    def _add(
        self,
        name: str,
        configs: list[PeftConfig],
        tensors: list[dict] | None,
        trainable: bool,
        slot_rank: int | None = None,
        source: str | os.PathLike | None = None,
    ) -> None:
        try:
            self._bank.add(name, configs, tensors, trainable, slot_rank)
        except InputError as error:
            raise (InputError(f"{source}: {error}") if source else error) from error

    def extend_adapter(self, adapter_name: str, peft_config: PeftConfig | list[PeftConfig]) -> None:
        """Freeze what an adapter has and add parts of other methods to it, which are trained from now on.

        It is a hybrid then. A head that it has goes on being trained if the new part has it too.

        Raises:
            InputError: there is no such adapter, or the config does not fit; the model is then as it was.
        """
        self._bank.extend(adapter_name, peft_config if isinstance(peft_config, list) else [peft_config])

    def set_adapter(self, adapter_name: str | list[str]) -> None:
        """Make an adapter the active one, trainable if it was added so; or several, which act together.

        Only parameter values change, so nothing recompiles, except when more adapters act together than ever
        before, for training with another ``lora_dropout``, or where a method of virtual tokens (prompt,
        prefix or P-tuning) is switched on or off: the graph is another one then, compiled at the next call.
        Of a head or bias that several active adapters have, the last one's is used.

        Raises:
            InputError: there is no such adapter, one is named twice, or one is merged.
        """
        names = [adapter_name] if isinstance(adapter_name, str) else list(adapter_name)
        if not names or len(set(names)) < len(names):
            raise InputError(f"set_adapter needs names of adapters, each once, not {adapter_name!r}")
        self._bank.activate(names)

    def delete_adapter(self, adapter_name: str) -> None:
        """Forget an adapter; if it was active, the first of the others becomes active.

        Raises:
            InputError: there is no such adapter, or one is merged.
        """
        self._bank.delete(adapter_name)

    @contextmanager
    def disable_adapter(self) -> Iterator[None]:
        """Context manager: inside, the model is the base model.

        Unlike in PEFT, that holds for trained biases too: the base model's own values stand in for them.
        Nothing recompiles, except with methods of virtual tokens (prompt, prefix and P-tuning): without these
        tokens the graph is another one, compiled at the first call inside and again at the first one after.
        """
        with self._bank.disabled():
            yield

    def add_weighted_adapter(
        self,
        adapters: Sequence[str],
        weights: Sequence[float],
        adapter_name: str,
        combination_type: str = "svd",
        svd_rank: int | None = None,
        svd_clamp: float | None = None,
        density: float | None = None,
        majority_sign_method: str = "total",
    ) -> None:
        """Add a LoRA adapter that is a combination of others; it does not become the active one.

        Args:
            adapters: names of adapters of LoRA on linear and embedding cells.
            weights: one for each; negative ones subtract.
            adapter_name: a new name.
            combination_type: "cat" (exact; the ranks add up), "svd" (the best of rank ``svd_rank``), or, of A
                and B by themselves, which need one rank, "linear", "ties", "dare_linear", "dare_ties",
                "magnitude_prune"; with "_svd" added, the last four work on the whole updates.
            svd_rank: default: the largest of the adapters' ranks.
            svd_clamp: cut the factors of a decomposition off at this quantile.
            density: the share of entries that pruning keeps, in (0, 1].
            majority_sign_method: "total" or "frequency", for the kinds with "ties".

        Raises:
            InputError: an unknown name or kind, ranks that differ where they must not, several adapters with
                heads of their own, or a name that is taken.
        """
        from mindpeft.tuners.weighted import Recipe, add_weighted_adapter

        adapter_files.check_adapter_name(adapter_name)
        recipe = Recipe(combination_type, svd_rank, svd_clamp, density, majority_sign_method)
        add_weighted_adapter(self._bank, adapters, weights, adapter_name, recipe)

    def add_fusion_adapter(
        self, adapters: Sequence[str], adapter_name: str, peft_config: AdapterFusionConfig | None = None
    ) -> None:
        """Add a hybrid of copies of bottleneck adapters and a fresh AdapterFusion that mixes them.

        It does not become the active one. The copies are frozen unless ``train_adapters``; heads of theirs
        are left behind, so give the fusion a ``task_type`` or ``modules_to_save`` if it needs one.

        Args:
            adapters: names of bottleneck adapters, the one that decides on norms and residual last.
            adapter_name: a new name.
            peft_config: default: AdapterHub's "dynamic" fusion; what it says of the adapters is filled in.

        Raises:
            InputError: an unknown name, an adapter of another method, or a name that is taken.
        """
        from mindpeft.tuners.fusing import add_fusion_adapter

        adapter_files.check_adapter_name(adapter_name)
        add_fusion_adapter(self._bank, adapters, adapter_name, peft_config)

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
        return self._bank.base.model

    # Files and numbers ------------------------------------------------------------------------------------

    def save_pretrained(
        self,
        save_directory: str | os.PathLike,
        selected_adapters: list[str] | None = None,
        convert_to_lora: bool = False,
    ) -> None:
        """Write adapters in PEFT's format: "default" into the folder itself, others into sub-folders.

        Args:
            save_directory: made if absent.
            selected_adapters: default: all.
            convert_to_lora: write adapters of PiSSA and OLoRA, which take something out of the base model's
                weights, as equal ones of ordinary LoRA with twice the rank, which leave them as they are
                (what PEFT does when given the path of the untrained adapter).

        Raises:
            InputError: an unknown name, an adapter that can't be converted, or the folder can't be written.
        """
        names = list(self._bank.adapters) if selected_adapters is None else selected_adapters
        for name, parts in [(name, self._bank.export(name, convert_to_lora)) for name in names]:
            folder = adapter_files.adapter_folder(save_directory, name)
            for config, _ in parts:
                config.base_model_name_or_path = config.base_model_name_or_path or self._bank.base.name
                if config.task_type is None:
                    config.auto_mapping = self._bank.base.auto_mapping
            adapter_files.write_adapter(folder, parts)

    def training_hooks(self) -> list[TrainingHook]:
        """Make anew what the active adapters' methods add to every training step; see ``TrainStep``."""
        return self._bank.training_hooks()


def get_peft_model(
    model: nn.Cell,
    peft_config: PeftConfig | list[PeftConfig],
    adapter_name: str = "default",
    autocast_adapter_dtype: bool = True,
    slot_rank: int | None = None,
) -> PeftModel:
    """Put a fresh adapter into a model.

    Args:
        model: any ``mindspore.nn.Cell``; changed in place: cells wrapped, parameters frozen.
        peft_config: the method and its targets; a list of them makes one hybrid adapter.
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
