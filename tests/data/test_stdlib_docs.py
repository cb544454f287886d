"""The quickstart's data: enough rows, all topics, nothing that leaks from one side to the other."""

from __future__ import annotations

import re
from collections import Counter

import pytest

from mindpeft.data import stdlib_docs
from mindpeft.data.stdlib_docs import TOPICS, load_stdlib_docs
from mindpeft.data.text_dataset import build_text_dataset
from mindpeft.errors import InputError


@pytest.fixture(scope="module")
def tables():
    return load_stdlib_docs()


def test_size_topics_and_balance(tables):
    train, test = tables
    assert 4000 < len(train.rows) + len(test.rows) < 6000
    assert 0.15 < len(test.rows) / (len(train.rows) + len(test.rows)) < 0.25
    for table in tables:
        counts = Counter(row.values["label"] for row in table.rows)
        assert set(counts) == set(TOPICS)
        assert len(counts) == 15
        assert max(counts.values()) / len(table.rows) < 0.2


def test_no_text_twice(tables):
    texts = [
        " ".join(re.findall(r"\w+", row.values["text"].lower())) for table in tables for row in table.rows
    ]
    assert len(set(texts)) == len(texts)


def test_same_every_time(tables):
    assert load_stdlib_docs() == tables


def test_rows_make_a_data_set(tables):
    train = build_text_dataset(tables[0], text_column="text", label_column="label")
    test = build_text_dataset(tables[1], text_column="text", label_column="label", labels=train.label_map)
    assert len(train.label_map) == 15
    assert len(test) == len(tables[1].rows)


def test_python_without_sources(monkeypatch):
    monkeypatch.setattr(stdlib_docs, "source_docstrings", lambda module: iter(()))
    with pytest.raises(InputError, match="has no sources of its standard library"):
        load_stdlib_docs()
