"""Label maps have a stable order, survive a file, and name the nearest label."""

from __future__ import annotations

import json

import pytest

from mindpeft.data.label_map import LabelMap
from mindpeft.errors import InputError


def test_learnt_order():
    assert LabelMap.learn(["b", "a", "b", "C"]).names == ("C", "a", "b")
    assert LabelMap.learn(["10", "2", "-1", 2]).names == ("-1", "2", "10")
    assert LabelMap.learn(["10", "2", "x"]).names == ("10", "2", "x")
    assert LabelMap.learn([True, False]).names == ("false", "true")


def test_ids():
    labels = LabelMap(("neg", "pos"))
    assert [labels.id_of(value) for value in ("neg", "pos", " pos ", 0, "1")] == [0, 1, 1, 0, 1]
    numbers = LabelMap(("1", "2"))
    assert [numbers.id_of(value) for value in (1, "2")] == [0, 1]
    assert labels.id2label == {0: "neg", 1: "pos"}
    assert labels.label2id == {"neg": 0, "pos": 1}


@pytest.mark.parametrize(
    ("names", "value", "message"),
    [
        (("negative", "positive"), "postive", r"unknown label 'postive': .*did you mean 'positive'\?"),
        (("a", "b"), 2, r"unknown label '2': the labels are a, b$"),
        (("1", "2"), 0, r"unknown label '0': the labels are 1, 2"),
        (tuple("abcdefghijkl"), "z", r"the labels are a, b, .*, j, \.\.\.$"),
    ],
)
def test_unknown_label(names, value, message):
    with pytest.raises(InputError, match=message):
        LabelMap(names).id_of(value)


def test_file(tmp_path):
    labels = LabelMap(("新闻", "sport", "10"))
    labels.save(tmp_path / "labels.json")
    assert LabelMap.load(tmp_path / "labels.json") == labels
    value = json.loads((tmp_path / "labels.json").read_text(encoding="utf-8"))
    assert value["id2label"] == {"0": "新闻", "1": "sport", "2": "10"}
    assert LabelMap.from_dict({"label2id": {"b": 1, "a": 0}}).names == ("a", "b")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[]", r"labels.json: a label map needs id2label or label2id"),
        ('{"id2label": {"0": "a", "2": "b"}}', r"labels.json: label ids must be 0, 1, 2\.\.\.: 0, 2"),
        ('{"id2label": {"x": "a"}}', r"labels.json: label ids must be 0, 1, 2"),
        ('{"id2label": {"0": "a", "1": "a"}}', r"labels.json: label names must differ: a, a"),
        ("{", r"labels.json is not valid JSON"),
    ],
)
def test_bad_file(tmp_path, content, message):
    (tmp_path / "labels.json").write_text(content)
    with pytest.raises(InputError, match=message):
        LabelMap.load(tmp_path / "labels.json")
