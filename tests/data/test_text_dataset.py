"""Rows become examples of each task; every bad row is refused with its line."""

from __future__ import annotations

import json

import pytest

from mindpeft.data.label_map import LabelMap
from mindpeft.data.text_dataset import load_text_dataset
from mindpeft.errors import InputError


@pytest.fixture
def load(tmp_path):
    """Write a file and load it as a data set with columns text and label."""

    def load(content, name="data.csv", **options):
        path = tmp_path / name
        path.write_text(content, encoding="utf-8")
        return load_text_dataset(path, **{"text_column": "text", "label_column": "label", **options})

    return load


def test_single_label_by_name(load):
    data = load("text,label\ngood film,pos\nbad film,neg\n")
    assert data.label_map.names == ("neg", "pos")
    assert [(example.text, example.label, example.line) for example in data.examples] == [
        ("good film", 1, 2),
        ("bad film", 0, 3),
    ]


def test_labels_learnt_in_training_are_used_in_evaluation(load):
    train = load("text,label\na,3\nb,20\nc,1\n")
    assert train.label_map.names == ("1", "3", "20")
    test = load("text,label\na,20\n", labels=train.label_map)
    assert [example.label for example in test.examples] == [2]
    assert load("text,label\na,pos\n", labels=["pos", "neg"]).examples[0].label == 0


def test_pairs_and_text_without_labels(load):
    data = load("text,second\na,b\n", text_pair_column="second", label_column=None)
    assert (data[0].text, data[0].text_pair, data[0].label) == ("a", "b", None)
    assert data.label_map is None
    assert load("one\ntwo\n", "data.txt", label_column=None, task="masked_lm").examples[1].text == "two"


def test_multi_label(load):
    options = {"task": "multi_label_classification"}
    data = load("text,label\na,x|y\nb,\nc,y | z\n", **options)
    assert data.label_map.names == ("x", "y", "z")
    assert [example.label for example in data.examples] == [[1.0, 1.0, 0.0], [0.0] * 3, [0.0, 1.0, 1.0]]
    rows = '{"text": "a", "label": ["x", "z"]}\n{"text": "b", "label": []}\n'
    same = load(rows, "data.jsonl", labels=data.label_map, **options)
    assert [example.label for example in same.examples] == [[1.0, 0.0, 1.0], [0.0] * 3]
    semicolon = load("text,label\na,x;y\n", label_separator=";", **options)
    assert semicolon.label_map.names == ("x", "y")


def test_regression(load):
    data = load("text,label\na,1\nb,-2.5e-1\n", task="regression")
    assert [example.label for example in data.examples] == [1.0, -0.25]
    assert data.label_map is None
    assert load('{"text": "a", "label": 3}', "data.jsonl", task="regression")[0].label == 3.0


def test_token_classification(load):
    data = load(
        "text\tlabel\n我 爱 北 京\tO O B I\n", "data.tsv", task="token_classification", labels=["O", "B", "I"]
    )
    assert data[0].text == ["我", "爱", "北", "京"]
    assert data[0].label == [0, 0, 1, 2]
    rows = json.dumps({"text": ["New York", "is"], "label": ["B", "O"]})
    assert load(rows, "data.jsonl", task="token_classification")[0].text == ["New York", "is"]


MULTI, REAL, TOKENS = "multi_label_classification", "regression", "token_classification"
BAD = [
    ("csv", "text,label\na,x\n ,y\n", {}, r"data.csv, line 3: empty text in column 'text'"),
    ("csv", "text,label\na,x\nb, \n", {}, r"data.csv, line 3: no label in column 'label'"),
    ("csv", 'text,label\n"a\nb",x\nc,y\n,z\n', {}, r"data.csv, line 5: empty text"),
    ("csv", "text,label\na,pos\nb,neh\n", {"labels": ["neg", "pos"]}, r"line 3: .*'neh'.* mean 'neg'"),
    ("csv", "text,label\na,x\nb,x\n", {}, r"nothing to learn in column 'label': the only label is 'x'"),
    ("csv", "txt,label\na,x\n", {}, r"data.csv has no column 'text'; .* txt, label; did you mean 'txt'"),
    ("csv", "text,labels\na,x\n", {}, r"has no column 'label'; .*did you mean 'labels'"),
    ("csv", "text,label\na,x\n", {"text_pair_column": "b"}, r"no column 'b'; its columns are text, label"),
    ("csv", "text,b,label\na,,x\n", {"text_pair_column": "b"}, r"line 2: empty text in column 'b'"),
    ("jsonl", '{"text": "a", "label": 1}\n{"label": 2}', {}, r"data.jsonl, line 2: no text in column 'text'"),
    ("jsonl", '{"text": "a", "label": 1}\n{"text": "b"}', {}, r"line 2: no label in column 'label'"),
    ("jsonl", '{"text": "a", "label": null}', {}, r"line 1: no label in column 'label'"),
    ("jsonl", '{"text": 5, "label": 1}', {}, r"line 1: column 'text' holds '5', not text"),
    ("jsonl", '{"text": "a", "label": [1]}', {}, r"line 1: column 'label' holds \[1\], not one label"),
    ("jsonl", '{"text": "\\ud83d", "label": 1}', {}, r"line 1: .* holds half a surrogate pair at 0"),
    ("csv", "text,label\na,1\nb,high\n", {"task": REAL}, r"line 3: .* must hold a finite number, not 'high'"),
    ("csv", "text,label\na,nan\n", {"task": REAL}, r"line 2: .* must hold a finite number, not 'nan'"),
    ("csv", "text,label\na,1e999\n", {"task": REAL}, r"line 2: .* must hold a finite number, not '1e999'"),
    ("jsonl", '{"text": "a", "label": true}', {"task": REAL}, r"line 1: .* a finite number, not 'True'"),
    ("csv", "text,label\na,\n", {"task": REAL}, r"line 2: .* must hold a finite number, not ''"),
    ("csv", "text,label\na,x||y\n", {"task": MULTI}, r"line 2: an empty label between '\|' in"),
    ("jsonl", '{"text": "a", "label": [["x"]]}', {"task": MULTI}, r"line 1: .* must hold a list of labels"),
    ("jsonl", '{"text": "a", "label": {"x": 1}}', {"task": MULTI}, r"line 1: .* must hold labels, not"),
    ("csv", "text,label\na,\n", {"task": MULTI}, r"nothing to learn in column 'label': there is no label"),
    ("csv", "text,label\na b c,O O\n", {"task": TOKENS}, r"line 2: 3 words but 2 tags in 'label'"),
    ("csv", "text,label\na,Q\n", {"task": TOKENS, "labels": ["O"]}, r"line 2: unknown label 'Q'"),
    ("jsonl", '{"text": ["a", ""], "label": ["O", "O"]}', {"task": TOKENS}, r"line 1: .* must hold words"),
    ("jsonl", '{"text": [], "label": []}', {"task": TOKENS, "labels": ["O"]}, r"line 1: .* must hold words"),
    ("csv", "text,label\na,x\n", {"task": "sequence"}, r"unknown task 'sequence': use one of single_label"),
    ("csv", "text,label\na,x\n", {"task": "masked_lm"}, r"masked_lm makes its own labels"),
    ("csv", "text,label\na,x\n", {"task": TOKENS, "text_pair_column": "label"}, r"takes one text"),
    ("csv", "text,label\na,x\n", {"labels": ["a", "a"]}, r"label names must differ: a, a"),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "content", "options", "message"), BAD)
def test_bad_rows(load, kind, content, options, message):
    with pytest.raises(InputError, match=message) as caught:
        load(content, f"data.{kind}", **options)
    assert str(caught.value).count("data.") <= 1  # the place is named once


def test_real_tags(shared_dir):
    folder = shared_dir / "data" / "msra_ner_zh"
    labels = LabelMap.from_dict({"label2id": json.loads((folder / "label2id.json").read_text())})
    data = load_text_dataset(
        folder / "small_train.tsv",
        text_column="text_a",
        label_column="label",
        task="token_classification",
        labels=labels,
    )
    assert len(data) > 100
    assert all(len(example.text) == len(example.label) for example in data.examples)
    assert labels.names[0] == "O"
