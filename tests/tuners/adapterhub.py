"""What the library `adapters` 1.2.0 computed (made by scripts/adapterhub_oracle.py), and the same here."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

import mindspore as ms
import numpy as np
import pytest
from mindspore import Tensor, ops
from safetensors.numpy import load_file

from mindpeft import PeftConfig, PeftModel, get_peft_model
from mindpeft.models import AutoModelForSequenceClassification
from mindpeft.tuners.adapterhub_files import import_adapterhub

DATA = Path(__file__).parent / "data" / "adapterhub"
EXPECTED = load_file(DATA / "expected.safetensors")
INPUTS = [Tensor(EXPECTED[key]) for key in ("input_ids", "attention_mask", "token_type_ids")]
LABELS, RATE = Tensor([0, 2, 1], ms.int32), 0.01
FUSIONS = {
    "fusion_dynamic": "seq_bn,norms",
    "fusion_parallel": "gated,par_bn",
    "fusion_odd": "leave_out,no_norm,seq_bn",
    "fusion_value": "per_layer,norms_inside,double_seq_bn",
}
OTHERS = ("ia3", "lora", "mam", "prefix", "unipelt")  # names of other methods begin with these
CASES = sorted(
    path.name
    for path in DATA.iterdir()
    if (path / "adapter_config.json").is_file() and not path.name.startswith(OTHERS)
)


def make_base(dtype: str = "float32") -> ms.nn.Cell:
    """The random BERT."""
    return AutoModelForSequenceClassification.from_pretrained(DATA / "base", dtype=dtype).set_train(False)


def opened(folder: Path, *names: str, dtype: str = "float32") -> PeftModel:
    """The BERT with stored adapters of those names, all of them active."""
    for name in names:
        import_adapterhub(DATA / name, folder / name)
    model = PeftModel.from_pretrained(make_base(dtype), folder / names[0], names[0], is_trainable=True)
    for name in names[1:]:
        model.load_adapter(folder / name, name, is_trainable=True)
    model.set_adapter(list(names))
    return model.set_train(False)


def fresh(config: PeftConfig, seed: int = 0) -> PeftModel:
    """The BERT with a fresh adapter."""
    ms.set_seed(seed)
    return get_peft_model(make_base(), config).set_train(False)


def randomised(model: PeftModel, seed: int = 5) -> PeftModel:
    """Noise on all that is trained, so that the adapter matters."""
    random = np.random.default_rng(seed)
    for parameter in model.trainable_params():
        value = parameter.asnumpy()
        parameter.set_data(Tensor((value + random.normal(0, 0.2, value.shape)).astype(np.float32)))
    return model


def logits(model: ms.nn.Cell) -> np.ndarray:
    """What a model answers to the stored batch."""
    return model(*INPUTS).asnumpy()


def name_here(key: str) -> str:
    """A parameter's name in the library as it is here."""
    key = re.sub(r".*prefix_tunings\.\w+\.self_prefix\.control_trans", "prompt_embeddings", key)
    key = re.sub(r"prefix_tuning\.prefix_gates\.\w+", "prefix_gate", key)
    key = re.sub(r"(loras\.\w+)\.gate", r"\1.lora_gate", key)
    key = re.sub(r"loras\.\w+\.(lora_[AB])", r"\1.weight", re.sub(r"loras\.\w+\.lora_gate", "lora_gate", key))
    key = re.sub(r"adapter_fusion_layer\.[^.]+", "adapter_fusion", key)
    key = re.sub(r"invertible_adapters\.\w+\.(\w)\.0", r"embeddings.\1.first", key)
    key = re.sub(r"invertible_adapters\.\w+\.(\w)\.2", r"embeddings.\1.last", key)
    key = re.sub(r"\.adapters\.\w+\.", ".", re.sub(r".*shared_parameters\.\w+\.", "", key))
    return re.sub(r"adapter_down\.\d\.", "adapter_down.", re.sub(r"\.scaling$", ".adapter_scaling", key))


def check_case(folder: Path, name: str) -> None:
    """Compare logits, gradients, 20 steps of gradient descent and the number of parameters."""
    check_training(opened(folder, name), name)


def scale_of(gradient: np.ndarray, gradients: Iterable[np.ndarray]) -> float:
    """What a gradient's error is measured by: its own size, or where all its terms cancel, that of others.

    A softmax doesn't see the bias of its keys, so that what is left in float32 is the rounding of the terms.
    """
    own = np.abs(gradient).max()
    return max(own, 1e-4) if own > 1e-12 else 1e-3 * max(np.abs(other).max() for other in gradients)


def check_training(model: PeftModel, name: str) -> None:
    """``check_case`` for a model that was opened already, with what its method adds to each step."""
    assert model.get_nb_trainable_parameters()[0] == EXPECTED[f"{name}/trained"][0]
    start = f"{name}/gradient/"
    expected = {
        name_here(key.removeprefix(start)): value for key, value in EXPECTED.items() if key.startswith(start)
    }
    parameters = {re.sub(r"\.slot\d+", "", p.name): p for p in model.trainable_params()}
    assert parameters.keys() == expected.keys()
    hooks = model.training_hooks()

    def loss_of(ids, mask, types):
        answers = model(ids, mask, types)
        loss = ops.cross_entropy(answers, LABELS)
        for hook in hooks:
            loss = loss + hook.penalty()
        return loss, answers

    step = ms.value_and_grad(loss_of, None, list(parameters.values()), has_aux=True)
    losses = []
    for number in range(20):
        (loss, answers), gradients = step(*INPUTS)
        losses.append(float(loss))
        if number == 0:
            np.testing.assert_allclose(answers.asnumpy(), EXPECTED[f"{name}/logits"], atol=1e-5)
        for (key, parameter), gradient in zip(parameters.items(), gradients, strict=True):
            if number == 0:
                wanted = expected[key].reshape(gradient.shape)
                atol = 1e-4 * scale_of(wanted, expected.values())
                np.testing.assert_allclose(gradient.asnumpy(), wanted, atol=atol, err_msg=key)
            ops.assign(parameter, parameter - RATE * gradient)
        for hook in hooks:
            hook.after_update((), (), Tensor(number + 1, ms.int32))
    assert losses == pytest.approx(EXPECTED[f"{name}/losses"].tolist(), rel=1e-4)
