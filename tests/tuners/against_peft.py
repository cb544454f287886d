"""One adapter of any method on the twin models, here and in torch + peft; tests call these checks."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import mindspore as ms
import numpy as np
import peft
import pytest
import torch
from mindspore import Tensor, nn
from safetensors.numpy import load_file

import mindpeft.tuners
from mindpeft import PeftConfig, PeftModel, get_peft_model
from mindpeft.parameters import base_places

LABELS = np.array([0, 2, 1, 1])


def each_option(names: Iterable[str]) -> pytest.MarkDecorator:
    """Parametrise a test by the ``name`` of options and the mode: by default the first, in PyNative (quick).

    The slow run tries all of them in both modes; compiled, each method is switched and trained elsewhere.
    """
    first, *others = names
    slow = pytest.mark.slow
    cases = [pytest.param(first, "pynative"), pytest.param(first, "graph", marks=slow)]
    cases += [pytest.param(name, mode, marks=slow) for name in others for mode in ("graph", "pynative")]
    return pytest.mark.parametrize(("name", "mode"), cases, indirect=["mode"])


@dataclass(frozen=True)
class Method:
    """A method and how its tests differ from those of others.

    Attributes:
        config: the name of its config class, here and in PEFT.
        options: the arguments that every test gives it, such as random initial values.
        names: what PEFT calls a tensor in memory -> its name in the file.
        noise: what is added to all that is trained, so that no value is special.
        tolerance: of merged weights.
    """

    config: str
    options: Mapping[str, Any] = field(default_factory=dict)
    names: Mapping[str, str] = field(default_factory=dict)
    noise: float = 0.05
    tolerance: float = 1e-5

    def ours(self, **options: Any) -> mindpeft.PeftConfig:
        """The config here."""
        return getattr(mindpeft.tuners, self.config)(**{**self.options, **options})

    def in_peft(self, twins: ModuleType, folder: Path | None = None, **options: Any) -> peft.PeftModel:
        """The torch twin with an adapter of random values; saved if a folder is given."""
        torch.manual_seed(3)
        # PEFT's task classes want a transformers model; the bare one does the same once heads are named.
        if options.get("task_type") in ("SEQ_CLS", "TOKEN_CLS"):
            options = {**options, "modules_to_save": ["classifier", "score"]}
        config = getattr(peft, self.config)(**{**self.options, **options})
        model = peft.PeftModel(twins.make_torch(), config)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.add_(torch.randn_like(parameter) * self.noise)
        model.eval()
        if folder is not None:
            model.save_pretrained(folder)
        return model

    def here(self, twins: ModuleType, seed: int = 11, **options: Any) -> PeftModel:
        """The MindSpore twin with an adapter of random values."""
        ms.set_seed(seed)
        model = get_peft_model(twins.make_model(), self.ours(**options))
        randomise(model, self.noise)
        return model

    def plain_name(self, key: str) -> str:
        """PEFT's name in memory -> the base parameter's or slot tensor's name here."""
        key = key.removeprefix("base_model.model.").replace(".modules_to_save.default.", ".")
        key = key.replace(".base_layer.", ".").replace(".default", "")
        for theirs, ours in self.names.items():
            key = key.replace(theirs, ours)
        return key


def randomise(model: PeftModel, noise: float = 0.05) -> None:
    """Add noise to all that is trained."""
    for parameter in model.trainable_params():
        value = parameter.asnumpy() + np.random.normal(0, noise, parameter.shape)
        parameter.set_data(Tensor(value.astype(np.float32)))


def file_name(parameter: ms.Parameter) -> str:
    """A parameter's name with torch's leaf."""
    classic = {"gamma": "weight", "beta": "bias", "embedding_table": "weight"}
    head, _, leaf = parameter.name.rpartition(".")
    return f"{head}.{classic.get(leaf, leaf)}"


def check_reading(twins: ModuleType, folder: Path, method: Method, **options: Any) -> None:
    """An adapter of PEFT's gives the same here: logits, numbers, gradients, files, switched off, merged."""
    theirs = method.in_peft(twins, folder / "theirs", **options)
    expected = twins.torch_logits(theirs)
    assert np.abs(expected - twins.torch_logits(twins.make_torch())).max() > 1e-3
    ours = PeftModel.from_pretrained(twins.make_model(), folder / "theirs", is_trainable=True)
    np.testing.assert_allclose(twins.logits(ours), expected, atol=1e-5)
    assert ours.get_nb_trainable_parameters() == theirs.get_nb_trainable_parameters()
    check_gradients(twins, method, ours, theirs)
    ours.save_pretrained(folder / "ours")
    check_files(folder / "ours", folder / "theirs")
    with ours.disable_adapter():
        np.testing.assert_array_equal(twins.logits(ours), base_logits(twins))
    check_merging(twins, method, ours, theirs, folder / "theirs")


def check_pynative(twins: ModuleType, folder: Path, method: Method, **options: Any) -> None:
    """Without a graph the logits are the same, and the base model's while the adapter is switched off."""
    theirs = method.in_peft(twins, folder, **options)
    ms.set_context(mode=ms.PYNATIVE_MODE)
    ours = PeftModel.from_pretrained(twins.make_model(), folder)
    np.testing.assert_allclose(twins.logits(ours), twins.torch_logits(theirs), atol=1e-5)
    with ours.disable_adapter():
        np.testing.assert_array_equal(twins.logits(ours), twins.logits(twins.make_model()))


def check_writing(twins: ModuleType, folder: Path, method: Method, **options: Any) -> None:
    """PEFT opens what is written here; fresh tensors are distributed as PEFT's."""
    ours = method.here(twins, **options)
    ours.save_pretrained(folder)
    theirs = peft.PeftModel(twins.make_torch(), peft.PeftConfig.from_pretrained(folder))
    theirs.load_adapter(folder, "default")
    np.testing.assert_allclose(twins.torch_logits(theirs.eval()), twins.logits(ours), atol=1e-5)


def check_initial_values(twins: ModuleType, method: Method, **options: Any) -> None:
    """Fresh tensors have the spread and the bounds of PEFT's."""
    ms.set_seed(0)
    ours = get_peft_model(twins.make_model(), method.ours(**options))
    quiet = Method(method.config, method.options, method.names, noise=0.0)
    theirs = quiet.in_peft(twins, **options)
    expected = {method.plain_name(k): v.detach().numpy() for k, v in theirs.named_parameters()}
    pairs: dict[Any, list[tuple[np.ndarray, np.ndarray]]] = {}
    for parameter in ours.trainable_params():
        kind = parameter.shape, parameter.name.rpartition(".")[2]
        pairs.setdefault(kind, []).append((parameter.asnumpy(), expected[file_name(parameter)]))
    for kind, values in pairs.items():  # of all layers together: the twins are small
        mine, other = (np.stack(side) for side in zip(*values, strict=True))
        spread = 6 / np.sqrt(mine.size)
        assert mine.mean() == pytest.approx(other.mean(), abs=spread * other.std() + 1e-7), kind
        assert mine.std() == pytest.approx(other.std(), rel=spread, abs=1e-7), kind
        assert np.abs(mine).max() == pytest.approx(np.abs(other).max(), rel=0.2 + spread, abs=1e-7), kind


def check_gradients(twins: ModuleType, method: Method, ours: PeftModel, theirs: peft.PeftModel) -> None:
    """Loss and gradients are PEFT's."""
    logits = theirs.get_base_model()(torch.tensor(twins.IDS))
    loss = torch.nn.functional.cross_entropy(logits, torch.tensor(LABELS))
    loss.backward()
    gradients = {method.plain_name(k): v.grad for k, v in theirs.named_parameters() if v.grad is not None}
    parameters = {file_name(parameter): parameter for parameter in ours.trainable_params()}
    assert parameters.keys() == gradients.keys()
    value, found = loss_and_gradients(ours, list(parameters.values()))(
        Tensor(twins.IDS), Tensor(LABELS, ms.int32)
    )
    assert float(value) == pytest.approx(loss.item(), rel=1e-5)
    for key, gradient in zip(parameters, found, strict=True):
        expected = gradients[key].numpy()
        tolerance = 1e-4 * np.abs(expected).max() + 1e-7
        np.testing.assert_allclose(gradient.asnumpy(), expected, atol=tolerance, err_msg=key)


def loss_and_gradients(model: PeftModel, parameters: list[ms.Parameter]) -> Any:
    """The compiled function (ids, labels) -> (loss, gradients)."""

    def loss(ids, labels):
        return model(ids, labels)[0]

    return ms.value_and_grad(loss, None, parameters)


def check_files(ours: Path, theirs: Path) -> None:
    """Two folders hold the same config and, bit for bit, the same tensors."""
    tensors = [load_file(folder / "adapter_model.safetensors") for folder in (ours, theirs)]
    assert tensors[0].keys() == tensors[1].keys()
    for name, value in tensors[1].items():
        np.testing.assert_array_equal(tensors[0][name], value, err_msg=name)
    assert read_config(ours) == read_config(theirs)


def read_config(folder: Path) -> dict[str, Any]:
    """A folder's config without the order of names and without what names the twins' classes."""
    config = json.loads((folder / "adapter_config.json").read_text())
    for key in ("auto_mapping", "base_model_name_or_path"):
        config.pop(key)
    return {
        key: sorted(value) if key.endswith("_modules") and isinstance(value, list) else value
        for key, value in config.items()
    }


def base_logits(twins: ModuleType) -> np.ndarray:
    """What the bare MindSpore twin answers; computed once in each mode, which round differently."""
    return logits_in_mode(twins, ms.get_context("mode"))


@cache
def logits_in_mode(twins: ModuleType, mode: int) -> np.ndarray:
    return twins.logits(twins.make_model())


def check_merging(
    twins: ModuleType, method: Method, ours: PeftModel, theirs: peft.PeftModel, folder: Path
) -> None:
    """Merged weights are PEFT's and give the same logits; twenty rounds leave every bit as it was."""
    before, base = twins.logits(ours), weights_of(ours)
    for _ in range(20):
        ours.merge_adapter()
        ours.unmerge_adapter()
    for name, value in weights_of(ours).items():
        np.testing.assert_array_equal(value, base[name], err_msg=name)
    ours.merge_adapter(safe_merge=True)
    np.testing.assert_allclose(twins.logits(ours), before, atol=1e-5)
    ours.unmerge_adapter()
    np.testing.assert_array_equal(twins.logits(ours), before)
    state = theirs.merge_and_unload().state_dict()
    bare = PeftModel.from_pretrained(twins.make_model(), folder).merge_and_unload()
    for name, place in base_places(bare).items():
        np.testing.assert_allclose(
            place.read(), state[name].numpy(), atol=method.tolerance, rtol=1e-5, err_msg=name
        )


def check_half_precision(config: PeftConfig) -> None:
    """On a float16 linear cell "0" (8, 8) the adapter is float32, the result float16, and merging exact."""
    cell = nn.SequentialCell(nn.Dense(8, 8, dtype=ms.float16))
    model = get_peft_model(cell, config)
    randomise(model)
    assert {str(parameter.dtype) for parameter in model.trainable_params()} == {"Float32"}
    x = Tensor(np.random.default_rng(0).normal(size=(3, 8)).astype(np.float16))
    y = model(x)
    assert y.dtype == ms.float16
    model.merge_adapter()
    np.testing.assert_allclose(y.asnumpy(), model(x).asnumpy(), atol=3e-2)


def weights_of(model: PeftModel) -> dict[str, np.ndarray]:
    """Every parameter of the model inside, slots included."""
    return {
        parameter.name: parameter.asnumpy().copy() for parameter in model.get_base_model().get_parameters()
    }


def check_switching(twins: ModuleType, method: Method, *choices: Mapping[str, Any]) -> None:
    """Switching between adapters compiles nothing anew, and each answers as it does alone."""
    model = method.here(twins, seed=1, **choices[0])
    for number, options in enumerate(choices[1:], 2):
        ms.set_seed(number)
        model.add_adapter(f"number {number}", method.ours(**options))
        model.set_adapter(f"number {number}")
        randomise(model, method.noise)
    names = list(model.peft_config)
    answers = {}
    for name in names:
        model.set_adapter(name)
        answers[name] = twins.logits(model)
    compiled = len(model.compile_cache)
    for name in names * 2:
        model.set_adapter(name)
        np.testing.assert_array_equal(twins.logits(model), answers[name])
    with model.disable_adapter():
        np.testing.assert_array_equal(twins.logits(model), base_logits(twins))
    assert len(model.compile_cache) == compiled == 1
    first = method.here(twins, seed=1, **choices[0])
    np.testing.assert_allclose(twins.logits(first), answers[names[0]], atol=1e-5)
