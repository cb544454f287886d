"""Checkpoints of a run: everything that continuing needs, each folder whole or not there."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
from mindspore import Parameter, Tensor, nn

from mindpeft.convert.safetensors_file import SafetensorsFile, write_safetensors
from mindpeft.convert.tensors import RawTensor
from mindpeft.errors import InputError
from mindpeft.files import atomic_folder, read_json, write_json
from mindpeft.train.callbacks import TrainerState
from mindpeft.train.optim import AdamW
from mindpeft.tuners.hooks import TrainingHook

OPTIMIZER_FILE = "optimizer.safetensors"
STATE_FILE = "trainer_state.json"
_PREFIX = "checkpoint-"
_WEIGHT = "parameter."
_HOOK = "hook."


def save_checkpoint(
    folder: Path,
    model: nn.Cell,
    optimizer: AdamW,
    state: TrainerState,
    hooks: Sequence[TrainingHook] = (),
) -> None:
    """Write ``optimizer.safetensors``, ``trainer_state.json`` and the model's own files.

    ``optimizer.safetensors`` holds AdamW's moments, the state of the step's hooks, and the exact trainable
    parameters too, since the model's own files may round or rename them.
    """
    with atomic_folder(folder) as temporary:
        if hasattr(model, "save_pretrained"):
            model.save_pretrained(temporary)
        weights = zip(optimizer.names, optimizer.parameters, strict=True)
        tensors = [(_WEIGHT + name, RawTensor.from_parameter(parameter)) for name, parameter in weights]
        tensors += [(name, RawTensor.from_numpy(value)) for name, value in optimizer.state_dict().items()]
        tensors += [(name, RawTensor.from_parameter(value)) for name, value in _hook_state(hooks).items()]
        write_safetensors(temporary / OPTIMIZER_FILE, tensors)
        write_json(temporary / STATE_FILE, state.to_dict())


def load_checkpoint(folder: Path, optimizer: AdamW, hooks: Sequence[TrainingHook] = ()) -> TrainerState:
    """Restore parameters, moments and the hooks' state, and return the state of the run.

    Raises:
        InputError: the folder is no checkpoint, or one of other trainable parameters; nothing is changed.
    """
    state = read_state(folder)
    tensors = _read(folder)
    _check_weights(folder, tensors, optimizer)
    _check_hooks(folder, tensors, hooks)
    own = (_WEIGHT, _HOOK)
    optimizer.load_state_dict(
        {name: tensor.numpy() for name, tensor in tensors.items() if not name.startswith(own)}
    )
    _set_weights(tensors, optimizer)
    _set_hooks(tensors, hooks)
    return state


def _hook_state(hooks: Sequence[TrainingHook]) -> dict[str, Parameter]:
    return {
        f"{_HOOK}{index}.{name}": parameter
        for index, hook in enumerate(hooks)
        for name, parameter in hook.state().items()
    }


def load_weights(folder: Path, optimizer: AdamW, hooks: Sequence[TrainingHook] = ()) -> None:
    """Restore the trainable parameters, and what the hooks know of them (the best model at the end)."""
    tensors = _read(folder)
    _check_weights(folder, tensors, optimizer)
    _check_hooks(folder, tensors, hooks)
    _set_weights(tensors, optimizer)
    _set_hooks(tensors, hooks)


def read_state(folder: Path) -> TrainerState:
    """The ``trainer_state.json`` of a checkpoint.

    Raises:
        InputError: it is missing or holds other keys.
    """
    values = read_json(folder / STATE_FILE)
    try:
        return TrainerState(**values)
    except TypeError as error:
        raise InputError(f"{folder / STATE_FILE} is not the state of a run: {error}") from error


def _read(folder: Path) -> dict[str, RawTensor]:
    file = SafetensorsFile(folder / OPTIMIZER_FILE)
    try:
        return {name: file.read(name) for name in file.infos}
    finally:
        file.close()


def _check_weights(folder: Path, tensors: dict[str, RawTensor], optimizer: AdamW) -> None:
    wanted = {_WEIGHT + name: shape for name, shape in zip(optimizer.names, optimizer.shapes, strict=True)}
    found = {name: tensor.shape for name, tensor in tensors.items() if name.startswith(_WEIGHT)}
    for name in sorted(wanted.keys() | found.keys()):
        if wanted.get(name) != found.get(name):
            raise InputError(
                f"{folder} is a checkpoint of other trainable parameters: {name.removeprefix(_WEIGHT)!r} is "
                f"{found.get(name, 'absent')} there and {wanted.get(name, 'absent')} here"
            )


def _set_weights(tensors: dict[str, RawTensor], optimizer: AdamW) -> None:
    for name, parameter in zip(optimizer.names, optimizer.parameters, strict=True):
        # A copy: the file's tensor may share its memory, and a step writes into the parameter's.
        value = Tensor(np.array(tensors[_WEIGHT + name].numpy())).astype(parameter.dtype)
        parameter.set_data(value)


def _check_hooks(folder: Path, tensors: dict[str, RawTensor], hooks: Sequence[TrainingHook]) -> None:
    wanted = {name: tuple(value.shape) for name, value in _hook_state(hooks).items()}
    if wanted != {name: tuple(t.shape) for name, t in tensors.items() if name.startswith(_HOOK)}:
        raise InputError(f"{folder} is a checkpoint of another method: the state of its steps does not fit")


def _set_hooks(tensors: dict[str, RawTensor], hooks: Sequence[TrainingHook]) -> None:
    for name, parameter in _hook_state(hooks).items():
        parameter.set_data(Tensor(np.array(tensors[name].numpy())))


def list_checkpoints(output_dir: Path) -> list[Path]:
    """The complete checkpoints in ``output_dir``, the oldest first."""
    found = [
        (int(match[1]), folder)
        for folder in output_dir.glob(f"{_PREFIX}*")
        if (match := re.fullmatch(rf"{_PREFIX}(\d+)", folder.name)) and (folder / STATE_FILE).is_file()
    ]
    return [folder for _, folder in sorted(found)]


def checkpoint_folder(output_dir: Path, step: int) -> Path:
    """Where the checkpoint of ``step`` stands."""
    return output_dir / f"{_PREFIX}{step}"


def check_output_dir(output_dir: Path, may_hold_files: bool) -> None:
    """Raise ``InputError`` unless a run may write to the folder: a new run only if nothing is in it."""
    if output_dir.exists() and not output_dir.is_dir():
        raise InputError(f"output_dir {output_dir} is a file")
    if not may_hold_files and output_dir.exists() and any(output_dir.iterdir()):
        raise InputError(
            f"output_dir {output_dir} is not empty: choose another, set overwrite_output_dir, "
            f"or resume_from_checkpoint"
        )


def find_checkpoint(output_dir: Path, wanted: str | bool | None) -> Path | None:
    """The checkpoint that ``resume_from_checkpoint`` means; None for a fresh start.

    Raises:
        InputError: there is none.
    """
    if not wanted:
        return None
    if wanted is True:
        checkpoints = list_checkpoints(output_dir)
        if not checkpoints:
            raise InputError(f"nothing to resume: {output_dir} holds no complete checkpoint")
        return checkpoints[-1]
    folder = Path(wanted)
    if not (folder / STATE_FILE).is_file():
        raise InputError(
            f"can't resume from {folder}: it holds no {STATE_FILE}, so it is no complete checkpoint"
        )
    return folder


def remove_old_checkpoints(output_dir: Path, state: TrainerState, limit: int | None) -> None:
    """Keep ``limit`` checkpoints: the one just written, the best one, and the newest of the others."""
    if limit is None:
        return
    current = checkpoint_folder(output_dir, state.global_step)
    best = state.best_model_checkpoint
    kept = {current} if best is None else {current, Path(best)}
    others = [folder for folder in list_checkpoints(output_dir) if folder not in kept]
    remove_checkpoints(others[: max(0, len(others) - max(0, limit - len(kept)))])


def remove_checkpoints(folders: Iterable[Path]) -> None:
    """Delete checkpoint folders; each loses its state file first, so that it never looks complete."""
    for folder in folders:
        (folder / STATE_FILE).unlink(missing_ok=True)
        shutil.rmtree(folder, ignore_errors=True)


def how_to_resume(output_dir: Path) -> str:
    """Where the last complete checkpoint is, as the end of a sentence."""
    checkpoints = list_checkpoints(output_dir)
    if not checkpoints:
        return "; no checkpoint was written"
    return f"; last complete checkpoint: {checkpoints[-1]}; resume with resume_from_checkpoint: true"
