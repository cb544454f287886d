"""Steps that tests of methods share: a small task, and what autograd gives for it on either side."""

from __future__ import annotations

import mindspore as ms
import numpy as np
import torch
from mindspore import Tensor, nn

from mindpeft.parameters import CLASSIC_NAMES
from mindpeft.train.optim import AdamW
from mindpeft.train.runner import StepRunner

LABELS = np.array([0, 2, 1, 1], np.int32)


def file_name(parameter: ms.Parameter) -> str:
    """A parameter's name with torch's leaf."""
    head, _, leaf = parameter.name.rpartition(".")
    return f"{head}.{CLASSIC_NAMES.get(leaf, leaf)}"


def gradients(model: nn.Cell, ids: np.ndarray) -> tuple[float, dict[str, np.ndarray]]:
    """The loss over `LABELS`, and its gradients by torch's names."""
    parameters = model.trainable_params()

    def loss(ids, labels):
        return model(ids, labels)[0]

    value, found = ms.value_and_grad(loss, None, parameters)(Tensor(ids), Tensor(LABELS))
    return float(value), {file_name(p): g.asnumpy() for p, g in zip(parameters, found, strict=True)}


def torch_loss(model: torch.nn.Module, ids: np.ndarray) -> torch.Tensor:
    bare = model.get_base_model() if hasattr(model, "get_base_model") else model
    return torch.nn.functional.cross_entropy(bare(torch.tensor(ids)), torch.tensor(LABELS).long())


def torch_gradients(model: torch.nn.Module, ids: np.ndarray) -> tuple[float, dict[str, np.ndarray]]:
    """The same in torch, by PEFT's names in memory."""
    loss = torch_loss(model, ids)
    loss.backward()
    return loss.item(), {k: p.grad.numpy() for k, p in model.named_parameters() if p.grad is not None}


def curve(model: nn.Cell, ids: np.ndarray, steps: int, rate: float = 1e-2, each=None) -> list[float]:
    """Losses of AdamW's steps over one batch, through the compiled step; `each` is called after every one."""
    runner = StepRunner(model, AdamW(model), max_grad_norm=0.0)
    losses = []
    for step in range(1, steps + 1):
        losses.append(runner.train({"input_ids": ids, "labels": LABELS}, step, rate)[0])
        if each is not None:
            each(step)
    assert runner.graphs <= 1
    return losses


def torch_curve(
    model: torch.nn.Module, ids: np.ndarray, steps: int, rate: float = 1e-2, each=None
) -> list[float]:
    """The same in torch."""
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=rate, weight_decay=0.0)
    losses = []
    for step in range(1, steps + 1):
        optimizer.zero_grad()
        loss = torch_loss(model, ids)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        if each is not None:
            each(step)
    return losses


def assert_gradients_equal(found: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> None:
    """Equal names, and values within 1e-4 of each tensor's largest."""
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        limit = 1e-4 * np.abs(value).max() + 1e-7
        np.testing.assert_allclose(found[key], value, atol=limit, err_msg=key)


def shift(model: nn.Cell, seed: int = 7, scale: float = 0.05) -> None:
    """Add noise to all that is trained."""
    random = np.random.default_rng(seed)
    for parameter in model.trainable_params():
        noise = random.normal(0, scale, parameter.shape).astype(np.float32)
        parameter.set_data(Tensor(parameter.asnumpy() + noise))
