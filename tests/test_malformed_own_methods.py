"""Broken folders of the methods that Hugging Face PEFT does not have."""

from __future__ import annotations

import shutil

import mindspore as ms
import numpy as np
import pytest

from mindpeft import (
    BitFitConfig,
    BottleneckConfig,
    DiffPruningConfig,
    FullConfig,
    LayerFreezingConfig,
    PeftModel,
    get_peft_model,
)
from tests.broken_folders import (
    HUGE,
    NAN,
    assert_refused,
    assert_untouched,
    cast,
    drop,
    keys,
    put,
    rename,
    replaced,
    watched,
    without,
)
from tests.tuners.adapterhub import make_base

pytestmark = pytest.mark.usefixtures("pynative")

WORDS = "base_model.model.words.diff_weight."
NORM = "base_model.model.encoder.layer.0.output.LayerNorm."
KEPT = 5


def at(column, value, kind=np.int32):
    """Another index in one place of the embedding's (2, kept)."""

    def change(indices):
        indices = indices.astype(kind)
        indices[column, 1] = value
        return indices

    return replaced(f"{WORDS}indices", change)


def repeated(indices):
    return np.repeat(indices[:, :1], KEPT, axis=1)


def both(*changes):
    return lambda folder: [change(folder) for change in changes]


DIFFS = {
    "index_high": (at(0, 23), r"'words.diff_weight.indices' has the index 23 for axis 0, .* in \[0, 23\)"),
    "index_wide": (at(1, 16), r"has the index 16 for axis 1, which must lie in \[0, 16\)"),
    "index_negative": (at(0, -1), r"has the index -1 for axis 0, which must lie in \[0, 23\)"),
    "index_absurd": (at(1, 2**62, np.int64), r"has the index 4611686018427387904 for axis 1"),
    "index_unsigned": (at(1, 2**63, np.uint64), r"has the index 9223372036854775808 for axis 1"),
    "index_twice": (replaced(f"{WORDS}indices", repeated), r"names the place \(0, 0\) twice"),
    "index_twice_vector": (
        put(f"{NORM}diff_bias.indices", np.array([[3, 1, 3]], np.int32)),
        r"diff_bias.indices' names the place \(3,\) twice",
    ),
    "index_float": (at(0, 1.0, np.float32), "diff_weight.indices' must hold whole numbers, not float32"),
    "index_part": (at(0, 1.5, np.float64), "must hold whole numbers, not float64"),
    "index_nan": (at(0, NAN, np.float16), "must hold whole numbers, not float16"),
    "index_bool": (at(0, True, bool), "must hold whole numbers, not bool"),
    "index_flat": (
        replaced(f"{WORDS}indices", lambda i: i.reshape(-1)),
        r"is \(10,\) in the file and \(2, 5",
    ),
    "index_axes": (replaced(f"{WORDS}indices", lambda i: i.T), r"is \(5, 2\) in the file and \(2, 5\)"),
    "index_absent": (drop(f"{WORDS}indices"), "missing from the file: 'words.diff_weight.indices'"),
    "values_whole": (replaced(f"{WORDS}values", lambda v: v.astype(np.int32)), "values' has dtype I32"),
    "values_fewer": (
        replaced(f"{WORDS}values", lambda v: v[1:]),
        r"values' is \(4,\) in the file and \(5,\)",
    ),
    "values_absent": (drop(f"{WORDS}values"), "missing from the file: 'words.diff_weight.values'"),
    "dense": (
        put("base_model.model.words.diff_weight", np.ones((23, 16), np.float32)),
        "no place for: 'words",
    ),
    "other_cell": (rename("words", "kinds"), "tensors missing .*'words.diff_weight.*no place for: 'kinds"),
    "kept_absent": (without("kept"), "the key 'kept' is missing: how many differences"),
    "kept_list": (keys(kept=[5]), r"kept must be an object of keys and values, not \[5\]"),
    "kept_text": (
        keys(kept={"words.diff_weight": "5"}),
        r"kept\['words.diff_weight'\] must be an integer, 0",
    ),
    "kept_negative": (keys(kept={"words.diff_weight": -5}), "must be an integer, 0 or more, not -5"),
    "kept_other": (
        keys(**{"kept__words.diff_weight": 4}),
        r"is \(2, 5\) in the file and \(2, 4\) in the model",
    ),
    "kept_huge": (keys(**{"kept__words.diff_weight": HUGE}), r"is \(2, 5\) in the file and \(2, 1000"),
    "gates": (keys(gamma=0.5), "gamma must be below 0 and zeta above 1"),
}

BIAS = "base_model.model.encoder.layer.0.attention.self.query.bias"
SELECTED = {
    "bitfit": {
        "missing": (drop(BIAS), "missing from the file: 'encoder.layer.0.attention.self.query.bias'"),
        "shape": (put(BIAS, np.ones(15, np.float32)), r"query.bias' is \(15,\) in the file and \(16,\)"),
        "whole_numbers": (cast(np.int32), "query.bias' has dtype I32|has dtype I32"),
        "extra": (put("base_model.model.no.bias", np.ones(2, np.float32)), "no place for: 'no.bias'"),
        "targets": (keys(target_modules=["querry"]), "no cell matches target_modules"),
        "nothing": (keys(target_modules=["words"]), "BITFIT finds nothing to train: the model has no biases"),
        "fewer": (keys(target_modules=["query", "key"]), "missing from the file: .*key.bias"),
    },
    "freeze": {
        "layers_absent": (without("freeze_layers"), "FREEZE needs freeze_layers or exclude_modules"),
        "layers_text": (keys(freeze_layers="1"), "freeze_layers must be how many of the first layers"),
        "layers_negative": (keys(freeze_layers=-1), "freeze_layers must be how many of the first layers"),
        "layers_range": (keys(freeze_layers=[[2, 2]]), r"freeze_layers has an empty range: \[2, 2\]"),
        "layers_unknown": (keys(freeze_layers=[7]), "names layer 7, but the model has layers 0 to 2"),
        "fewer": (keys(freeze_layers=[0]), "missing from the file: 'encoder.layer.1"),
    },
    "full": {
        "missing": (drop(BIAS), "missing from the file: 'encoder.layer.0.attention.self.query.bias'"),
        "shape": (put(BIAS, np.ones((4, 4), np.float32)), r"query.bias' is \(4, 4\) in the file and \(16,\)"),
        "targets": (keys(target_modules="("), "is not a regular expression"),
        "other": (keys(target_modules=["words"]), "missing from the file: 'words.weight'"),
    },
}

DOWN = "base_model.model.bert.encoder.layer.0.output.adapter_down.weight"
BOTTLENECKS = {
    "missing": (drop(DOWN), "missing from the file: 'bert.encoder.layer.0.output.adapter_down.weight'"),
    "shape": (replaced(DOWN, lambda v: v[:-1]), r"adapter_down.weight' is \(11, 48\) in the file and \(12"),
    "factor": (keys(reduction_factor=0), "reduction_factor must be greater than 0"),
    "factor_other": (keys(reduction_factor=8), r"adapter_down.* in the file and \(6, 48\)"),
    "factor_layers": (keys(reduction_factor={"0": 4}), "reduction_factor .*layer 1"),
    "activation": (keys(non_linearity="sine"), "non_linearity must be one of"),
    "nowhere": (keys(output_adapter=False), "mh_adapter or output_adapter must be true"),
    "leave_out": (keys(leave_out=[0]), "no place for: 'bert.encoder.layer.0"),
    "rate": (keys(stochastic_depth=1), r"stochastic_depth must lie in \[0, 1\)"),
}

TABLES = {"diff": DIFFS, **SELECTED, "bottleneck": BOTTLENECKS}


@pytest.fixture(scope="module")
def sound(twins, tmp_path_factory):
    """A sound folder for each table."""
    folder = tmp_path_factory.mktemp("sound")
    ms.set_context(mode=ms.PYNATIVE_MODE)
    model = get_peft_model(twins.make_model(), DiffPruningConfig(target_modules=["words", "LayerNorm"]))
    for parameter in model.trainable_params():
        if parameter.name.endswith(("diff_weight", "diff_bias")):
            value = np.zeros(parameter.shape, np.float32)
            value.reshape(len(value), -1)[: KEPT if value.ndim == 2 else 3, 0] = 0.5
            parameter.set_data(ms.Tensor(value))
    model.save_pretrained(folder / "diff")
    configs = {
        "bitfit": BitFitConfig(target_modules=["query"]),
        "freeze": LayerFreezingConfig(freeze_layers=[0, 1, 2]),
        "full": FullConfig(target_modules=["query"]),
    }
    for name, config in configs.items():
        get_peft_model(twins.make_model(), config).save_pretrained(folder / name)
    get_peft_model(make_base(), BottleneckConfig(reduction_factor=4)).save_pretrained(folder / "bottleneck")
    return folder


@pytest.fixture(scope="module")
def bases(twins):
    """One base model for all cases of a kind, since none may change it, with what it holds."""
    ms.set_context(mode=ms.PYNATIVE_MODE)
    small, bert = watched(twins.make_model()), watched(make_base())
    return {name: bert if name == "bottleneck" else small for name in TABLES}


@pytest.mark.parametrize(("kind", "name"), [(kind, name) for kind in TABLES for name in TABLES[kind]])
def test_broken_folders(sound, bases, tmp_path, kind, name):
    change, message = TABLES[kind][name]
    shutil.copytree(sound / kind, tmp_path / "in")
    change(tmp_path / "in")
    model, values, flags = bases[kind]
    assert_refused(message, lambda: PeftModel.from_pretrained(model, tmp_path / "in"))
    assert_untouched(model, values, flags)


@pytest.mark.parametrize("kind", TABLES)
def test_the_sound_folders_open(twins, sound, kind):
    model = PeftModel.from_pretrained(
        make_base() if kind == "bottleneck" else twins.make_model(), sound / kind
    )
    assert list(model.peft_config) == ["default"]
