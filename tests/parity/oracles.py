"""Who says what is right: Hugging Face PEFT or, for methods that it does not have, plain torch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import peft
import torch
import transformers
from mindspore import Tensor, nn
from safetensors.torch import load_file, save_file
from torch.nn.utils import parametrize

from mindpeft import PeftModel
from mindpeft.tuners.diff_pruning_layers import DiffLayer
from tests.models.reference import HEADS, run_theirs, to_torch
from tests.parity.adapters import add_noise, open_in_peft, trained_in_peft

if TYPE_CHECKING:
    from tests.parity.case import Case

Batch = dict[str, np.ndarray]
PREFIX = "base_model.model."


def open_theirs(folder: Path, head: str, **options: Any) -> transformers.PreTrainedModel:
    """The base model in transformers."""
    auto = getattr(transformers, HEADS[head])
    return auto.from_pretrained(folder, attn_implementation="eager", **options).eval()


class Oracle:
    """The other side of a comparison.

    Args:
        case: the method's configuration.
        folder: the base model's.
        head: its head.
    """

    NAME: str

    def __init__(self, case: Case, folder: Path, head: str) -> None:
        self.case, self.folder, self.head = case, folder, head

    def base(self) -> transformers.PreTrainedModel:
        """The bare model."""
        return open_theirs(self.folder, self.head, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)

    def fresh(self, noise: float) -> torch.nn.Module:
        """A model with a fresh adapter, noise on all that is trained."""
        raise NotImplementedError

    def save(self, model: torch.nn.Module, folder: Path) -> None:
        """Write its adapter."""
        raise NotImplementedError

    def opened(self, folder: Path) -> torch.nn.Module:
        """A model with the adapter of a folder."""
        raise NotImplementedError

    def numbers(self, model: torch.nn.Module) -> tuple[int, ...]:
        """How many parameters are trained, and how many there are, if it says that."""
        raise NotImplementedError

    def trained(self, model: torch.nn.Module) -> dict[str, torch.nn.Parameter]:
        """What is trained, by the oracle's plain names."""
        raise NotImplementedError

    def logits(self, model: torch.nn.Module, batch: Batch) -> torch.Tensor:
        """The logits; of a model with an output for each token, those of the real tokens."""
        logits = run_theirs(model, **batch).logits
        return logits if logits.ndim == 2 else logits[:, -batch["input_ids"].shape[1] :]

    def precise(self, model: torch.nn.Module) -> torch.nn.Module:
        """The model in float64: float32 itself is off by 1e-5 on MiniLM's vocabulary."""
        return model.double()

    def loss(self, model: torch.nn.Module, batch: Batch, labels: np.ndarray) -> torch.Tensor:
        """The cross-entropy."""
        logits = self.logits(model, batch)
        return torch.nn.functional.cross_entropy(logits.flatten(0, -2), to_torch(labels).flatten())

    def training_loss(self, model: torch.nn.Module, batch: Batch, labels: np.ndarray) -> torch.Tensor:
        """What training descends on: the loss and the method's own terms."""
        return self.loss(model, batch, labels)

    def after_update(self, model: torch.nn.Module, step: int) -> None:
        """What the method does after a step, before gradients are dropped."""

    def prepare(self, ours: PeftModel) -> None:
        """Make chance in our model that of the oracle."""


class PeftOracle(Oracle):
    """Hugging Face PEFT."""

    NAME = "PEFT"

    def fresh(self, noise: float) -> peft.PeftModel:
        torch.manual_seed(3)
        config = getattr(peft, self.case.config)
        options = {"task_type": self.case.task_type(self.head), **self.case.options}
        model = peft.get_peft_model(self.base(), config(**options))
        add_noise(model, noise)
        return model.eval()

    def save(self, model: peft.PeftModel, folder: Path) -> None:
        model.save_pretrained(folder)

    def opened(self, folder: Path) -> peft.PeftModel:
        return open_in_peft(self.base(), folder)

    def numbers(self, model: peft.PeftModel) -> tuple[int, ...]:
        return model.get_nb_trainable_parameters()

    def trained(self, model: peft.PeftModel) -> dict[str, torch.nn.Parameter]:
        return trained_in_peft(model)


class AdaLoraOracle(PeftOracle):
    """PEFT's AdaLoRA: orthogonality in the loss, pruning after each step."""

    def numbers(self, model: peft.PeftModel) -> tuple[int, ...]:
        # PEFT counts each layer's constant `ranknum` among the parameters.
        trained, total = super().numbers(model)
        return trained, total - sum("ranknum" in name for name, _ in model.named_parameters())

    def training_loss(self, model: peft.PeftModel, batch: Batch, labels: np.ndarray) -> torch.Tensor:
        # Without a task type PEFT calls the model past AdaLoRA's own forward, which adds the orthogonality.
        return run_theirs(model.base_model, **batch, labels=labels).loss

    def after_update(self, model: peft.PeftModel, step: int) -> None:
        model.base_model.update_and_allocate(step)


class TorchOracle(Oracle):
    """A model of transformers some of whose own parameters are trained, and nothing else."""

    NAME = "torch"

    def fresh(self, noise: float) -> torch.nn.Module:
        torch.manual_seed(3)
        model = self.base()
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(self.is_head(name) or self.case.trains(name))
        add_noise(model, noise)
        return model

    def is_head(self, name: str) -> bool:
        """Whether a parameter belongs to the fresh head of a task, which is trained in any case."""
        return name.startswith("classifier.")

    def save(self, model: torch.nn.Module, folder: Path) -> None:
        self.write(folder, {name: value.data for name, value in self.trained(model).items()})

    def write(self, folder: Path, tensors: dict[str, torch.Tensor], **config: Any) -> None:
        """Write tensors and a config as an adapter."""
        folder.mkdir(exist_ok=True)
        save_file(
            {PREFIX + name: value.contiguous() for name, value in tensors.items()},
            folder / "adapter_model.safetensors",
        )
        values = {"peft_type": self.case.method, "task_type": self.case.task_type(self.head)}
        (folder / "adapter_config.json").write_text(json.dumps({**values, **self.case.options, **config}))

    def opened(self, folder: Path) -> torch.nn.Module:
        model = self.base()
        self.patch(model, self.tensors_in(folder))
        return model

    def tensors_in(self, folder: Path) -> dict[str, torch.Tensor]:
        """The tensors of an adapter's folder by the base model's names."""
        tensors = load_file(folder / "adapter_model.safetensors")
        return {name.removeprefix(PREFIX): value for name, value in tensors.items()}

    def patch(self, model: torch.nn.Module, tensors: dict[str, torch.Tensor]) -> None:
        """Put values into a model; each must have its place there."""
        assert not model.load_state_dict(tensors, strict=False).unexpected_keys

    def numbers(self, model: torch.nn.Module) -> tuple[int, ...]:
        return (sum(value.numel() for value in self.trained(model).values()),)

    def trained(self, model: torch.nn.Module) -> dict[str, torch.nn.Parameter]:
        return {name: value for name, value in model.named_parameters() if value.requires_grad}


class Difference(torch.nn.Module):
    """W + z w: a parametrisation of one tensor, after Guo, Rush and Kim 2021."""

    def __init__(self, tensor: torch.Tensor, options: dict[str, Any]) -> None:
        super().__init__()
        self.diff = torch.nn.Parameter(torch.zeros_like(tensor))
        self.alpha = torch.nn.Parameter(torch.full_like(tensor, options["alpha_init"]))
        self.temperature, self.gamma, self.zeta = (options[key] for key in ("temperature", "gamma", "zeta"))

    def change(self) -> torch.Tensor:
        """z w, with noise in training."""
        noise = torch.tensor(noise_of(tuple(self.alpha.shape))) if self.training else 0.0
        opened = torch.sigmoid((self.alpha + noise) / self.temperature)
        return torch.clamp(opened * (self.zeta - self.gamma) + self.gamma, 0, 1) * self.diff

    def forward(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor + self.change()

    def open_gates(self) -> torch.Tensor:
        """How many gates are expected to be open."""
        return torch.sigmoid(self.alpha - self.temperature * np.log(-self.gamma / self.zeta)).sum()


def noise_of(shape: tuple[int, ...]) -> np.ndarray:
    """Logistic noise, the same whenever a tensor has that shape."""
    u = np.random.default_rng(sum(shape) + len(shape)).uniform(0.05, 0.95, shape)
    return (np.log(u) - np.log(1 - u)).astype(np.float32)


class FixedNoise(nn.Cell):
    """`noise_of` in place of our noise."""

    def __init__(self) -> None:
        super().__init__(auto_prefix=False)

    def construct(self, shape: tuple[int, ...]) -> Tensor:
        return Tensor(noise_of(shape))


class DiffOracle(TorchOracle):
    """Diff pruning as torch's parametrisations of the targeted weights and biases."""

    def fresh(self, noise: float) -> torch.nn.Module:
        torch.manual_seed(3)
        model = self.base()
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(self.is_head(name))
        targets = tuple(self.case.options["target_modules"])
        for cell in [cell for name, cell in model.named_modules() if name.rpartition(".")[2] in targets]:
            for leaf in ("weight", "bias"):
                difference = Difference(getattr(cell, leaf), self.case.options)
                parametrize.register_parametrization(cell, leaf, difference)
        add_noise(model, noise)
        return model.eval()

    def differences(self, model: torch.nn.Module) -> dict[str, Difference]:
        """By the names of the tensors that they change."""
        return {
            name.replace(".parametrizations.", ".").removesuffix(".0"): cell
            for name, cell in model.named_modules()
            if isinstance(cell, Difference)
        }

    def trained(self, model: torch.nn.Module) -> dict[str, torch.nn.Parameter]:
        named = {name: value for name, value in model.named_parameters() if self.is_head(name)}
        for name, difference in self.differences(model).items():
            path, _, leaf = name.rpartition(".")
            named[f"{path}.diff_{leaf}"] = difference.diff
            named[f"{path}.diff_{leaf}_alpha"] = difference.alpha
        return named

    def save(self, model: torch.nn.Module, folder: Path) -> None:
        tensors = {name: value.data for name, value in model.named_parameters() if self.is_head(name)}
        kept = {}
        for name, difference in self.differences(model).items():
            path, _, leaf = name.rpartition(".")
            change, stem = difference.change().detach(), f"{path}.diff_{leaf}"
            tensors[f"{stem}.indices"] = change.nonzero().T.int()
            tensors[f"{stem}.values"] = change[change != 0]
            kept[stem] = int((change != 0).sum())
        self.write(folder, tensors, kept=kept)

    def patch(self, model: torch.nn.Module, tensors: dict[str, torch.Tensor]) -> None:
        parameters = dict(model.named_parameters())
        for name in [name for name in tensors if name.endswith(".indices")]:
            stem = name.removesuffix(".indices")
            place = tuple(tensors.pop(name).long())
            with torch.no_grad():
                parameters[stem.replace(".diff_", ".")][place] += tensors.pop(f"{stem}.values")
        super().patch(model, tensors)

    def training_loss(self, model: torch.nn.Module, batch: Batch, labels: np.ndarray) -> torch.Tensor:
        model.train()
        gates = sum(difference.open_gates() for difference in self.differences(model).values())
        return self.loss(model, batch, labels) + self.case.options["l0_weight"] * gates

    def prepare(self, ours: PeftModel) -> None:
        for _, cell in ours.cells_and_names():
            if isinstance(cell, DiffLayer):
                cell.noise = FixedNoise()
