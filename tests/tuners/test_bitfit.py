"""BitFit and the other methods that select base parameters, against torch with the same ones unfrozen."""

from __future__ import annotations

import json
import re

import mindspore as ms
import numpy as np
import pytest
import torch
from mindspore import Tensor, mint, nn
from safetensors.numpy import load_file

from mindpeft import BitFitConfig, FullConfig, LayerFreezingConfig, LoraConfig, PeftModel, get_peft_model
from mindpeft.config import PeftConfig
from mindpeft.errors import InputError
from tests.tuners.oracle import assert_gradients_equal, curve, gradients, shift, torch_curve, torch_gradients

pytestmark = pytest.mark.usefixtures("graph_mode")

LAYER_1_UP = r"(?!encoder\.layer\.0\.).*"
# name -> a config, and the parameters that it trains as a regular expression.
CASES = {
    "bitfit": (BitFitConfig(), r".*bias"),
    "bitfit_named": (BitFitConfig(target_modules=["query", "LayerNorm"]), r".*(query|LayerNorm)\.bias"),
    "bitfit_container": (BitFitConfig(target_modules=["attention"]), r".*attention\..*bias"),
    "bitfit_regex": (
        BitFitConfig(target_modules=r"encoder\.layer\.[12]\..*"),
        r"encoder\.layer\.[12]\..*bias",
    ),
    "bitfit_exclude": (
        BitFitConfig(exclude_modules=["encoder.layer.1", "key"]),
        r"(?!.*(layer\.1|key)\.).*bias",
    ),
    "bitfit_seq_cls": (BitFitConfig(task_type="SEQ_CLS"), r".*bias|classifier\..*"),
    "full": (FullConfig(), r".*"),
    "full_named": (
        FullConfig(target_modules=["encoder.layer.2", "c_attn.weight"]),
        r"encoder\.layer\.2\..*|c_attn.weight",
    ),
    "head_alone": (FullConfig(target_modules=[], task_type="SEQ_CLS"), r"classifier\..*"),
    "head_named": (FullConfig(target_modules=["classifier"], task_type="SEQ_CLS"), r"classifier\..*"),
    "full_embeddings": (FullConfig(target_modules="embeddings"), r"(words|kinds)\.weight"),
    "full_exclude": (FullConfig(exclude_modules=r".*\.?(words|kinds|bias)"), r"(?!words|kinds).*weight"),
    "freeze_first": (LayerFreezingConfig(freeze_layers=1), LAYER_1_UP),
    "freeze_ranges": (LayerFreezingConfig(freeze_layers=[0, [1, 3]]), r"(?!encoder).*"),
    "freeze_pattern": (
        LayerFreezingConfig(freeze_layers=2, layers_pattern="layer"),
        r"(?!encoder\.layer\.[01]\.).*",
    ),
    "freeze_names": (
        LayerFreezingConfig(exclude_modules=["words", "query", "LayerNorm"]),
        r"(?!.*(words|query|LayerNorm)\.).*",
    ),
    "freeze_head": (
        LayerFreezingConfig(freeze_layers=3, target_modules=["classifier", "dense"]),
        r"classifier\..*",
    ),
}


def torch_with(twins, pattern):
    model = twins.make_torch()
    model.words.padding_idx = None  # MindSpore's own Embedding trains that row too
    for name, parameter in model.named_parameters():
        parameter.requires_grad = re.fullmatch(pattern, name) is not None
    return model


@pytest.mark.parametrize("name", CASES)
def test_gradients_numbers_and_files(twins, tmp_path, name):
    ms.set_context(mode=ms.PYNATIVE_MODE)
    config, pattern = CASES[name]
    theirs, ours = torch_with(twins, pattern), get_peft_model(twins.make_model(), config)
    loss, expected = torch_gradients(theirs, twins.IDS)
    value, found = gradients(ours, twins.IDS)
    assert value == pytest.approx(loss, rel=1e-5)
    assert_gradients_equal(found, expected)
    trained = sum(value.size for value in expected.values())
    copies = (
        sum(p.numel() for n, p in theirs.named_parameters() if n.startswith("classifier"))
        if config.task_type
        else 0
    )
    everything = sum(p.numel() for p in theirs.parameters()) + copies
    assert ours.get_nb_trainable_parameters() == (trained, everything)

    shift(ours)
    adapted = twins.logits(ours)
    ours.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    assert {f"base_model.model.{key}": value.shape for key, value in expected.items()} == {
        key: value.shape for key, value in tensors.items()
    }
    written = json.loads((tmp_path / "adapter_config.json").read_text())
    assert written["peft_type"] == config.peft_type.value
    again = PeftModel.from_pretrained(twins.make_model(), tmp_path)
    np.testing.assert_array_equal(twins.logits(again), adapted)
    assert not again.trainable_params()
    # The file is a patch for the full model's checkpoint.
    patched = twins.make_torch()
    patch = {key.removeprefix("base_model.model."): value for key, value in tensors.items()}
    patched.load_state_dict({k: torch.tensor(v) for k, v in patch.items()}, strict=False)
    np.testing.assert_allclose(twins.torch_logits(patched), adapted, atol=1e-5)


@pytest.mark.parametrize("name", ["bitfit", "freeze_first"])
def test_twenty_steps_equal_torchs(twins, name):
    config, pattern = CASES[name]
    expected = torch_curve(torch_with(twins, pattern), twins.IDS, 20, 2e-3)
    found = curve(get_peft_model(twins.make_model(), config), twins.IDS, 20, 2e-3)
    np.testing.assert_allclose(found, expected, atol=1e-4)
    assert expected[-1] < expected[0] - 0.02


def test_switching_disabling_and_merging_are_exact(twins):
    base = twins.logits(twins.make_model())
    model = get_peft_model(twins.make_model(), BitFitConfig(), "biases")
    expected = {}
    for name, config in (
        ("biases", None),
        ("lora", LoraConfig(init_lora_weights=False)),
        ("rest", LayerFreezingConfig(freeze_layers=2)),
    ):
        if config is not None:
            model.add_adapter(name, config)
        model.set_adapter(name)
        if name != "lora":
            shift(model)
        expected[name] = twins.logits(model)
        with model.disable_adapter():
            np.testing.assert_array_equal(twins.logits(model), base)
    before = len(model.compile_cache)
    for _ in range(20):
        for name, logits in expected.items():
            model.set_adapter(name)
            np.testing.assert_array_equal(twins.logits(model), logits)
    model.merge_adapter()
    np.testing.assert_array_equal(twins.logits(model), expected["rest"])
    model.unmerge_adapter()
    np.testing.assert_array_equal(twins.logits(model), expected["rest"])
    with model.disable_adapter():
        np.testing.assert_array_equal(twins.logits(model), base)
    assert len(model.compile_cache) == before
    np.testing.assert_array_equal(twins.logits(model.merge_and_unload()), expected["rest"])


def test_refuses_a_file_that_lacks_a_tensor(twins, tmp_path):
    get_peft_model(twins.make_model(), BitFitConfig(target_modules=["query"])).save_pretrained(tmp_path)
    BitFitConfig(target_modules=["query", "c_attn"]).save_pretrained(tmp_path)
    with pytest.raises(InputError, match=r"tensors missing from the file: 'c_attn\.bias'"):
        PeftModel.from_pretrained(twins.make_model(), tmp_path)


def test_unload_returns_the_base(twins):
    model = get_peft_model(twins.make_model(), FullConfig())
    shift(model)
    np.testing.assert_array_equal(twins.logits(model.unload()), twins.logits(twins.make_model()))


class Normed(nn.Cell):
    """Two kinds of batch normalisation, and an output tied to the embedding."""

    def __init__(self):
        super().__init__()
        self.words = nn.Embedding(6, 4)
        self.classic, self.modern = nn.BatchNorm1d(4), mint.nn.BatchNorm1d(4)
        self.head = nn.Dense(4, 6)
        self.head.weight = self.words.embedding_table

    def construct(self, ids):
        return self.head(self.classic(self.words(ids)))


def test_ties_count_once_and_statistics_never_train(tmp_path):
    model = get_peft_model(Normed(), FullConfig())
    names = {p.name for p in model.trainable_params()}
    assert names == {
        "words.embedding_table",
        "classic.gamma",
        "classic.beta",
        "modern.weight",
        "modern.bias",
        "head.bias",
    }
    assert model.get_nb_trainable_parameters() == (24 + 16 + 6, 24 + 16 + 6)
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    assert "base_model.model.head.weight" not in tensors
    statistics = {key.rpartition(".")[2] for key in tensors if "running" in key or "tracked" in key}
    assert statistics == {"running_mean", "running_var", "num_batches_tracked"}
    PeftModel.from_pretrained(Normed(), tmp_path)
    # What is frozen under one of its names is frozen.
    frozen = get_peft_model(Normed(), FullConfig(exclude_modules=["words"]))
    assert "words.embedding_table" not in {p.name for p in frozen.trainable_params()}
    # A saved head is untied, and the table is trained on its own.
    saved = get_peft_model(Normed(), FullConfig(modules_to_save=["head"]))
    assert {"words.embedding_table", "head.weight"} <= {p.name for p in saved.trainable_params()}
    assert saved.get_nb_trainable_parameters()[0] == 24 + 16 + 6 + 24


def test_an_epoch_of_statistics_belongs_to_the_adapter():
    model = get_peft_model(Normed(), FullConfig())
    base = model.get_base_model().classic
    before = base.moving_mean.asnumpy().copy()
    base.moving_mean.set_data(Tensor(before + 3))
    with model.disable_adapter():
        np.testing.assert_array_equal(base.moving_mean.asnumpy(), before)
    np.testing.assert_array_equal(base.moving_mean.asnumpy(), before + 3)


def test_half_precision_is_trained_in_its_own_dtype():
    cell = nn.SequentialCell(nn.Dense(4, 4, dtype=ms.float16))
    model = get_peft_model(cell, BitFitConfig())
    assert [(p.name, str(p.dtype)) for p in model.trainable_params()] == [("0.bias", "Float16")]


def test_configs_read_back(tmp_path):
    for number, (config, _) in enumerate(CASES.values()):
        config.save_pretrained(tmp_path / str(number))
        again = PeftConfig.from_pretrained(tmp_path / str(number))
        again.inference_mode = False
        assert again == config


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: BitFitConfig(target_modules=3), "target_modules must be a list of names"),
        (lambda: BitFitConfig(exclude_modules=[1]), "exclude_modules must be a list of names"),
        (lambda: LayerFreezingConfig(), "FREEZE needs freeze_layers or exclude_modules"),
        (lambda: LayerFreezingConfig(freeze_layers=[]), "freeze_layers must be how many"),
        (lambda: LayerFreezingConfig(freeze_layers=-1), "freeze_layers must be how many .* not -1"),
        (lambda: LayerFreezingConfig(freeze_layers=True), "freeze_layers must be how many"),
        (lambda: LayerFreezingConfig(freeze_layers=[[1, 2, 3]]), "freeze_layers must be how many"),
        (lambda: LayerFreezingConfig(freeze_layers=[[3, 2]]), r"empty range: \[3, 2\]"),
        (
            lambda: LayerFreezingConfig(exclude_modules=["words"], layers_pattern="h"),
            "layers_pattern needs freeze_layers",
        ),
    ],
)
def test_refuses_bad_values(make, message):
    with pytest.raises(InputError, match=message):
        make()


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (BitFitConfig(target_modules=["qery"]), "no cell matches target_modules qery.*did you mean 'query'"),
        (
            BitFitConfig(target_modules=["intermediate"]),
            "BITFIT finds nothing to train: the model has no biases",
        ),
        (BitFitConfig(exclude_modules=".*"), "no cell matches"),
        (BitFitConfig(target_modules="(("), "not a regular expression"),
        (LayerFreezingConfig(freeze_layers=4), "names layer 3, but the model has layers 0 to 2"),
        (
            LayerFreezingConfig(freeze_layers=1, layers_pattern="h"),
            "the model has no layers with layers_pattern='h'",
        ),
        (LayerFreezingConfig(freeze_layers=3, target_modules=["encoder"]), "FREEZE finds nothing to train"),
    ],
)
def test_refuses_what_does_not_fit(twins, config, message):
    model = twins.make_model()
    with pytest.raises(InputError, match=message):
        get_peft_model(model, config)
    assert all(parameter.requires_grad for parameter in model.get_parameters())
