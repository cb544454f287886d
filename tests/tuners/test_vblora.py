"""VB-LoRA against torch + peft on twin models."""

from __future__ import annotations

import mindspore as ms
import numpy as np
import pytest
from mindspore import Tensor, nn
from peft.utils.constants import TRANSFORMERS_MODELS_TO_VBLORA_TARGET_MODULES_MAPPING
from safetensors.numpy import load_file, save_file

from mindpeft import PeftModel, get_peft_model
from mindpeft.errors import InputError
from mindpeft.tuners.vblora import VBLoRAConfig
from tests.tuners import against_peft as check

pytestmark = pytest.mark.usefixtures("graph_mode")

_FIRST = "encoder.layer.0.attention"  # PEFT finds the bank there before it finds the model's own name of it
VBLORA = check.Method(
    "VBLoRAConfig",
    {"num_vectors": 6, "vector_length": 4, "init_vector_bank_bound": 0.5, "init_logits_std": 1.0},
    names={f"{_FIRST}.{cell}.vblora_vector": ".vblora_vector" for cell in ("self.query", "output.dense")}
    | {"c_attn.vblora_vector": ".vblora_vector"},
)
OPTIONS = {
    "default_targets": {"bias": "vblora_only"},
    "widths_differ": {
        "target_modules": ["dense", "intermediate"],
        "exclude_modules": ["layer.2.output.dense"],
        "topk": 3,
        "r": 2,
        "task_type": "SEQ_CLS",
    },
    "conv1d": {"target_modules": ["c_attn"], "vector_length": 8, "topk": 1},
}


@check.each_option(OPTIONS)
def test_reads_what_peft_wrote(mode, twins, tmp_path, name):
    check.check_reading(twins, tmp_path, VBLORA, **OPTIONS[name])


def test_peft_reads_what_we_wrote(twins, tmp_path):
    check.check_writing(twins, tmp_path, VBLORA, **OPTIONS["widths_differ"])


def test_pynative_gives_the_same(twins, tmp_path):
    check.check_pynative(twins, tmp_path, VBLORA, **OPTIONS["widths_differ"])


def test_initial_values(twins):
    ms.set_seed(0)
    model = get_peft_model(twins.make_model(), VBLORA.ours(num_vectors=400, r=8, init_logits_std=0.3))
    values = {p.name.rpartition(".")[2]: p.asnumpy() for p in model.trainable_params()}
    for name in ("vblora_logits_A", "vblora_logits_B"):
        assert values[name].std() == pytest.approx(0.3, rel=0.05)
    assert 0.49 < np.abs(values["vblora_vector_bank"]).max() <= 0.5
    assert values["vblora_vector_bank"].std() == pytest.approx(1 / np.sqrt(12), rel=0.05)


def test_switching(twins):
    check.check_switching(twins, VBLORA, {}, OPTIONS["widths_differ"], {"r": 3})


@pytest.mark.parametrize(("number", "dtype"), [(6, np.uint8), (300, np.int16)])
def test_the_largest_logits_alone_both_ways(twins, tmp_path, number, dtype):
    options = {"save_only_topk_weights": True, "num_vectors": number, "topk": 3}
    ms.set_context(mode=ms.PYNATIVE_MODE)
    theirs = VBLORA.in_peft(twins, tmp_path / "theirs", **options)
    ours = PeftModel.from_pretrained(twins.make_model(), tmp_path / "theirs")
    np.testing.assert_allclose(twins.logits(ours), twins.torch_logits(theirs), atol=1e-5)
    ours.save_pretrained(tmp_path / "ours")
    mine, other = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("ours", "theirs"))
    assert mine.keys() == other.keys()
    for name, value in other.items():
        np.testing.assert_allclose(mine[name], value, atol=1e-6, err_msg=name)
        assert mine[name].dtype == value.dtype == (dtype if name.endswith("indices") else np.float32)
    check.check_writing(twins, tmp_path / "fresh", VBLORA, **options)


def test_the_largest_logits_alone_can_not_be_trained_further(twins, tmp_path):
    VBLORA.in_peft(twins, tmp_path, save_only_topk_weights=True)
    with pytest.raises(InputError, match="saved with save_only_topk_weights can't be trained further"):
        PeftModel.from_pretrained(twins.make_model(), tmp_path, is_trainable=True)


@pytest.mark.parametrize("damage", ["indices", "weights", "shape"])
def test_damaged_files_of_the_largest_logits_are_refused(twins, tmp_path, damage):
    VBLORA.in_peft(twins, tmp_path, save_only_topk_weights=True)
    path = tmp_path / "adapter_model.safetensors"
    tensors = load_file(path)
    name = next(name for name in tensors if name.endswith("indices"))
    if damage == "indices":
        tensors[name][0, 0, 0] = 6
    elif damage == "weights":
        del tensors[name.replace("indices", "weights")]
    else:
        tensors[name] = np.zeros((), np.uint8)
    save_file(tensors, path)
    message = "must be indices of the bank's 6 vectors" if damage == "indices" else "must have 2 numbers each"
    with pytest.raises(InputError, match=message):
        PeftModel.from_pretrained(twins.make_model(), tmp_path)


def test_default_targets_are_pefts():
    theirs = TRANSFORMERS_MODELS_TO_VBLORA_TARGET_MODULES_MAPPING
    assert theirs == VBLoRAConfig.DEFAULT_TARGETS


def test_dropout_acts_while_training_only(twins):
    model = VBLORA.here(twins, vblora_dropout=0.5)
    plain = VBLORA.here(twins)
    np.testing.assert_array_equal(twins.logits(model), twins.logits(plain))
    model.set_train(True)
    assert not np.array_equal(twins.logits(model), twins.logits(plain))


def test_half_precision_base_keeps_a_float32_adapter():
    cell = nn.SequentialCell(nn.Dense(8, 8, dtype=ms.float16))
    model = get_peft_model(cell, VBLORA.ours(target_modules=["0"]))
    x = Tensor(np.random.default_rng(0).normal(size=(3, 8)).astype(np.float16))
    y = model(x)
    assert y.dtype == ms.float16
    model.merge_adapter()
    np.testing.assert_allclose(y.asnumpy(), model(x).asnumpy(), atol=3e-2)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"r": 0}, "r must be a positive integer, not 0"),
        ({"topk": 7}, "topk=7 is more than the bank has vectors, 6"),
        ({"vector_length": 5}, "vector_length=5 does not divide both widths of .*, 16 and 16; .* is 16"),
        ({"init_logits_std": -1}, "init_logits_std must be 0 or more, not -1"),
        ({"vblora_dropout": 1.0}, r"vblora_dropout must lie in \[0, 1\)"),
        ({"bias": "lora_only"}, "bias must be one of none, all, vblora_only"),
        ({"target_modules": ["words"]}, "VB-LoRA can't wrap the cell 'words' of class Embedding"),
    ],
)
def test_mistakes(twins, options, message):
    with pytest.raises(InputError, match=message):
        get_peft_model(twins.make_model(), VBLORA.ours(**options))
