"""RoAd against torch + peft on twin models."""

from __future__ import annotations

import numpy as np
import pytest

from mindpeft import get_peft_model
from mindpeft.errors import InputError
from mindpeft.tuners.road import RoadConfig
from tests.tuners import against_peft as check

pytestmark = pytest.mark.usefixtures("graph_mode")

ROAD = check.Method("RoadConfig", {"group_size": 8}, noise=0.2)
OPTIONS = {
    "default_targets": {},
    "road_2": {"target_modules": ["dense", "intermediate"], "variant": "road_2", "group_size": 4},
    "road_4": {"target_modules": ["query", "intermediate"], "variant": "road_4", "task_type": "SEQ_CLS"},
    "pairs": {"target_modules": r".*layer\.1\..*\.dense", "group_size": 2, "modules_to_save": ["classifier"]},
}


@check.each_option(OPTIONS)
def test_reads_what_peft_wrote(mode, twins, tmp_path, name):
    check.check_reading(twins, tmp_path, ROAD, **OPTIONS[name])


def test_peft_reads_what_we_wrote(twins, tmp_path):
    check.check_writing(twins, tmp_path, ROAD, **OPTIONS["road_4"])


@pytest.mark.parametrize("name", ["default_targets", "road_4"])
def test_pynative_gives_the_same(twins, tmp_path, name):
    check.check_pynative(twins, tmp_path, ROAD, **OPTIONS[name])


@pytest.mark.parametrize("init", [True, False])
def test_initial_values(twins, init):
    check.check_initial_values(twins, ROAD, init_weights=init)


def test_switching(twins):
    choices = ({"target_modules": ["value"]}, {"variant": "road_2"}, {"variant": "road_4"})
    check.check_switching(twins, ROAD, *choices)


def test_another_grouping_in_the_same_slot_is_compiled_anew(twins):
    model = ROAD.here(twins, seed=1)
    expected = twins.logits(model)
    model.add_adapter("pairs", ROAD.ours(group_size=2))
    model.set_adapter("pairs")
    check.randomise(model, 0.2)
    pairs = twins.logits(model)
    model.merge_adapter()
    np.testing.assert_allclose(twins.logits(model), pairs, atol=1e-5)
    model.unmerge_adapter()
    model.set_adapter("default")
    np.testing.assert_array_equal(twins.logits(model), expected)


def test_half_precision_base_keeps_a_float32_adapter():
    check.check_half_precision(RoadConfig(target_modules=["0"], init_weights=False, group_size=4))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "group_size=64 does not divide the output's width of '.*query', 16"),
        ({"group_size": 3}, "group_size must be an even integer, 2 or more, not 3"),
        ({"group_size": 0}, "group_size must be an even integer, 2 or more, not 0"),
        ({"group_size": "8"}, "group_size must be an even integer, 2 or more, not '8'"),
        ({"variant": "road_3"}, "variant must be one of road_1, road_2, road_4, not 'road_3'"),
        (
            {"group_size": 8, "target_modules": ["c_attn"]},
            "RoAd can't wrap the cell 'c_attn' of class Conv1D",
        ),
        (
            {"group_size": 8, "target_modules": ["words"]},
            "RoAd can't wrap the cell 'words' of class Embedding",
        ),
        ({"group_size": 8, "modules_to_save": "classifier"}, "modules_to_save must be a list of names"),
    ],
)
def test_mistakes(twins, options, message):
    with pytest.raises(InputError, match=message):
        get_peft_model(twins.make_model(), RoadConfig(**options))
