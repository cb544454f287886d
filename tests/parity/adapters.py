"""One adapter on both sides: transformers + peft, and here."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import mindspore as ms
import numpy as np
import peft
import torch
from mindspore import Tensor

from mindpeft import PeftModel


def make_peft_model(
    base: torch.nn.Module, options: dict[str, Any], seed: int = 3, noise: float = 0.05
) -> peft.PeftModel:
    """A PEFT model over ``base``; ``noise`` is added to all that is trained (B, biases, saved cells too)."""
    torch.manual_seed(seed)
    model = peft.get_peft_model(base, peft.LoraConfig(**options))
    add_noise(model, noise)
    return model.eval()


def add_noise(model: torch.nn.Module, noise: float) -> None:
    """Add noise to all that is trained in a torch model."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * noise)


def randomise(model: PeftModel, seed: int = 4) -> None:
    """Add noise to all that is trained here, so that the adapter matters."""
    rng = np.random.default_rng(seed)
    for parameter in model.trainable_params():
        noise = rng.normal(0, 0.05, parameter.shape).astype(np.float32)
        parameter.set_data(Tensor(parameter.asnumpy() + noise))


def open_in_peft(base: torch.nn.Module, folder: Path) -> peft.PeftModel:
    """A base model with the adapter of a folder, in PEFT."""
    return peft.PeftModel.from_pretrained(base, folder).eval()


def trained_here(model: PeftModel) -> dict[str, ms.Parameter]:
    """What is trained here, by path."""
    return {name: parameter for name, parameter in named_parameters(model).items() if parameter.requires_grad}


def named_parameters(model: PeftModel) -> dict[str, ms.Parameter]:
    """Path in the base model -> parameter; of a tied one, the first path."""
    names: dict[int, str] = {}
    parameters = {}
    for path, cell in model.base_model.cells_and_names():
        for leaf, parameter in cell.parameters_and_names(expand=False):
            name = plain_name(f"{path}.{leaf}")
            if names.setdefault(id(parameter), name) == name:
                parameters[name] = parameter
    return parameters


def trained_in_peft(model: peft.PeftModel) -> dict[str, torch.nn.Parameter]:
    """What is trained in PEFT, by the same paths."""
    return {plain_name(name): value for name, value in model.named_parameters() if value.requires_grad}


def plain_name(name: str) -> str:
    """A parameter's name without what the wrappers of either side add."""
    for ours, plain in (
        ("base_model.model.", ""),
        (".base_layer.", "."),
        (".modules_to_save.default.", "."),
        (".default", ""),
        (".lora_magnitude_vector.weight", ".lora_magnitude_vector"),
    ):
        name = name.replace(ours, plain)
    # What stands around the whole model: PEFT's prompt learning has no ".model", our layer there no path.
    return name.removeprefix("base_model.").removeprefix("base_layer.").removeprefix(".")
