"""Bottleneck adapters against the numbers that AdapterHub's library gave, see scripts/adapterhub_oracle.py.

They are stored: the library wants another transformers than the tests do. All cases are compared on the model
for whole texts; some of them also on those for tokens and for masked words, with the same encoder.
"""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

import mindspore as ms
import numpy as np
import pytest
from mindspore import Tensor, ops
from safetensors.numpy import load_file, save_file

from mindpeft import PeftModel, models
from mindpeft.convert.checkpoint import open_checkpoint
from mindpeft.errors import InputError
from mindpeft.tuners.adapterhub_files import WEIGHT_NAMES, export_adapterhub, import_adapterhub
from tests.models import reference
from tests.parity.notes import assert_small, note
from tests.tuners.adapterhub import CASES, DATA, EXPECTED, INPUTS, RATE, name_here

pytestmark = pytest.mark.usefixtures("graph_mode")

STEPS = 20
# One of each kind of layer is compiled; the others differ in norms, gates and factors, and run in PyNative,
# which takes long for 20 steps.
IN_GRAPH = ("seq_bn", "double_seq_bn", "par_bn", "compacter", "invertible", "norms", "parallel_gated")
SHOWN = ("par_bn", "compacter", "norms")
OF_HEADS = load_file(DATA / "heads.safetensors")
UNDER_OTHERS = sorted({key.split("/")[1] for key in OF_HEADS if key.endswith("/losses")})
# By default those are tried on the model for texts, and one on each other head.
ON_HEADS = [
    *(pytest.param(name, "sequence", marks=() if name in SHOWN else pytest.mark.slow) for name in CASES),
    *(
        pytest.param(name, head, marks=() if name == shown else pytest.mark.slow)
        for head, shown in (("token", "compacter"), ("masked", "double_seq_bn"))
        for name in UNDER_OTHERS
    ),
]
# What the library's papers and users call them.
TITLES = {
    "seq_bn": "Pfeiffer (seq_bn)",
    "double_seq_bn": "Houlsby (double_seq_bn)",
    "par_bn": "parallel (par_bn)",
    "scaled_par_bn": "scaled parallel (scaled_par_bn)",
    "adapter_plus": "AdapterPlus",
    "compacter": "Compacter",
    "compacter_plus_plus": "Compacter++",
    "invertible": "Pfeiffer, invertible",
    "double_invertible": "Houlsby, invertible",
}
WHY = {
    "merge": "There is a non-linearity between the projections, or the adapter is behind a norm: no change "
    "of the base model's weights does the same.",
    "bases": "The library's numbers are stored, of the tiny model alone.",
}
_folder = TemporaryDirectory()


@cache
def base_folder(head: str) -> Path:
    """The stored base model, its head replaced by another stored one; made once."""
    if head == "sequence":
        return DATA / "base"
    folder = Path(_folder.name) / head
    folder.mkdir()
    tensors = load_file(DATA / "base" / "model.safetensors")
    own = f"{head}/base/"
    tensors = {
        key: value for key, value in tensors.items() if key.startswith("bert.") and "pooler" not in key
    }
    tensors |= {key.removeprefix(own): value for key, value in OF_HEADS.items() if key.startswith(own)}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((DATA / "base" / "config.json").read_text())
    config["architectures"] = [{"token": "BertForTokenClassification", "masked": "BertForMaskedLM"}[head]]
    config["id2label"] = {str(i): f"LABEL_{i}" for i in range(5)}
    config["label2id"] = {label: int(i) for i, label in config["id2label"].items()}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def stored(name: str, head: str) -> dict[str, np.ndarray]:
    """What the library gave for an adapter under a head."""
    values, start = (EXPECTED, f"{name}/") if head == "sequence" else (OF_HEADS, f"{head}/{name}/")
    return {key.removeprefix(start): value for key, value in values.items() if key.startswith(start)}


def opened(folder: Path, name: str, head: str) -> PeftModel:
    """The library's adapter in our model; its own head is not trained but where it came with the adapter."""
    import_adapterhub(DATA / name, folder)
    if head != "sequence":
        leave_head_out(folder)
    base = getattr(models, reference.HEADS[head]).from_pretrained(base_folder(head))
    return PeftModel.from_pretrained(base, folder, is_trainable=True).set_train(False)


def leave_head_out(folder: Path) -> None:
    """Take the head for whole texts out of an adapter's folder."""
    path = folder / "adapter_model.safetensors"
    tensors = {key: value for key, value in load_file(path).items() if ".classifier." not in key}
    save_file(tensors, path)
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "modules_to_save": None, "task_type": None}))


def labels_of(head: str) -> np.ndarray:
    return np.array([0, 2, 1], np.int32) if head == "sequence" else OF_HEADS[f"{head}/labels"]


@pytest.mark.parametrize(("name", "head"), ON_HEADS)
def test_computes_and_trains_as_the_library(tmp_path, name, head):
    """Logits, gradients, the losses of 20 steps of gradient descent, and how much is trained."""
    ms.set_context(mode=ms.GRAPH_MODE if name in IN_GRAPH else ms.PYNATIVE_MODE)
    model, expected, title = opened(tmp_path, name, head), stored(name, head), title_of(name)
    assert model.get_nb_trainable_parameters()[0] == expected["trained"][0]
    note(title, "parameters", base="tiny", head=head, error=0.0)
    gradients = {
        name_here(key.removeprefix("gradient/")): value
        for key, value in expected.items()
        if key.startswith("gradient/")
    }
    parameters = {parameter.name: parameter for parameter in model.trainable_params()}
    step = step_of(model, list(parameters.values()), Tensor(labels_of(head)))
    losses = []
    for number in range(STEPS):
        (loss, answers), found = step(*INPUTS)
        losses.append(float(loss))
        if number == 0:
            size = max(1.0, float(np.abs(expected["logits"]).max()))
            error = reference.absolute_error(answers, expected["logits"]) / size
            assert_small(title, "tiny", head, "forward", error, 1e-5)
            assert_small(title, "tiny", head, "oracle → read", error, 1e-5)
            worst = worst_gradient(dict(zip(parameters, found, strict=True)), gradients)
            assert_small(title, "tiny", head, "gradient", worst, 1e-4)
        for parameter, gradient in zip(parameters.values(), found, strict=True):
            ops.assign(parameter, parameter - RATE * gradient)
    worst = float(np.abs(np.array(losses) - expected["losses"]).max())
    assert_small(title, "tiny", head, "curve", worst, 1e-3)
    with pytest.raises(InputError, match="merged"):
        model.merge_adapter()


def step_of(model: PeftModel, parameters: list[ms.Parameter], labels: Tensor):
    """The compiled function inputs -> ((loss, logits), gradients)."""

    def loss_of(ids, mask, types):
        logits = model(ids, mask, types)
        rows = ops.reshape(logits, (-1, logits.shape[-1]))
        return ops.cross_entropy(rows, ops.reshape(labels, (-1,))), logits

    return ms.value_and_grad(loss_of, None, parameters, has_aux=True)


def worst_gradient(found: dict[str, Tensor], expected: dict[str, np.ndarray]) -> float:
    """The largest error of a gradient, relative to its own largest entry."""
    assert found.keys() == expected.keys()
    return max(
        reference.absolute_error(found[name], value) / max(float(np.abs(value).max()), 1e-4)
        for name, value in expected.items()
    )


@pytest.mark.parametrize("name", CASES)
def test_the_library_would_write_what_is_written(tmp_path, name):
    """Its own adapter, read and written again, holds the same bits (configs: test_adapterhub_files.py)."""
    import_adapterhub(DATA / name, tmp_path / "ours")
    export_adapterhub(tmp_path / "ours", tmp_path / "theirs", name, model_type="bert", model_name="")
    found, expected = tensors_of(tmp_path / "theirs"), tensors_of(DATA / name)
    assert found.keys() == expected.keys()
    worst = max(float(np.abs(found[key] - value).max()) for key, value in expected.items())
    assert_small(title_of(name), "tiny", "sequence", "write → oracle", worst, 0.0)
    note(title_of(name), "about", method="BOTTLENECK", oracle="AdapterHub", why=WHY)


def tensors_of(folder: Path) -> dict[str, np.ndarray]:
    """The adapter's tensors in a folder of the library's."""
    path = next(folder / file for file in WEIGHT_NAMES if (folder / file).is_file())
    with open_checkpoint(path) as checkpoint:
        return {name: checkpoint[name].numpy() for name in checkpoint}


def title_of(name: str) -> str:
    """The case's row in the table of methods."""
    return TITLES.get(name, "other bottlenecks")
