"""MindSpore data sets of tokens or texts, batched or not, in memory or MindRecord, give the same features."""

from __future__ import annotations

import mindspore.dataset as ds
import numpy as np
import pytest
from mindspore.mindrecord import FileWriter

from mindpeft.data.batching import BucketBatcher
from mindpeft.data.mindspore_source import encode_mindspore, features_from_mindspore, table_from_mindspore
from mindpeft.data.tokenization import AutoTokenizer
from mindpeft.errors import InputError

TEXTS = ["a short text", "北京 is far", "one more text with several words", "end"]


@pytest.fixture(scope="module")
def tokenizer(minilm_dir):
    return AutoTokenizer.from_pretrained(minilm_dir)


@pytest.fixture(scope="module")
def expected(tokenizer):
    encoded = tokenizer(TEXTS)
    return [{**{name: encoded[name][i] for name in encoded}, "labels": i % 2} for i in range(4)]


def plain(features):
    return [{name: np.asarray(value).tolist() for name, value in row.items()} for row in features]


def padded(tokenizer):
    columns = tokenizer(TEXTS, padding="max_length", max_length=12)
    arrays = {name: np.array(value, np.int32) for name, value in columns.items()}
    return arrays | {"label": np.array([0, 1, 0, 1], np.int64)}


@pytest.mark.parametrize("batch", [None, 3])
def test_tokens(tokenizer, expected, batch):
    data = ds.NumpySlicesDataset(padded(tokenizer), shuffle=False)
    features = features_from_mindspore(data if batch is None else data.batch(batch))
    assert plain(features) == expected
    assert sum(int(b["example_mask"].sum()) for b in BucketBatcher(features, 3)) == 4


def test_tokens_from_mindrecord(tokenizer, expected, tmp_path):
    path, columns = str(tmp_path / "data.mindrecord"), padded(tokenizer)
    writer = FileWriter(path, shard_num=1)
    schema = {name: {"type": "int32", "shape": [-1]} for name in columns if name != "label"}
    writer.add_schema(schema | {"label": {"type": "int32"}}, "tokens")
    writer.write_raw_data(
        [{name: int(v[i]) if name == "label" else v[i] for name, v in columns.items()} for i in range(4)]
    )
    writer.commit()
    assert plain(features_from_mindspore(ds.MindDataset(path, shuffle=False))) == expected


@pytest.mark.parametrize("batch", [None, 2])
def test_texts_as_mindnlp_gives_them(tokenizer, expected, batch):
    data = ds.GeneratorDataset(list(zip(TEXTS, [3, 7, 3, 7], strict=True)), ["text", "label"], shuffle=False)
    data = data if batch is None else data.batch(batch)
    features, labels = encode_mindspore(data, tokenizer)
    assert list(features) == expected
    assert labels.names == ("3", "7")


def test_texts_from_mindrecord(tokenizer, expected, tmp_path):
    path = str(tmp_path / "text.mindrecord")
    writer = FileWriter(path, shard_num=1)
    writer.add_schema({"text": {"type": "string"}, "label": {"type": "string"}}, "texts")
    writer.write_raw_data([{"text": text, "label": "xy"[i % 2]} for i, text in enumerate(TEXTS)])
    writer.commit()
    features, labels = encode_mindspore(ds.MindDataset(path, shuffle=False), tokenizer)
    assert list(features) == expected
    assert labels.names == ("x", "y")


@pytest.mark.parametrize(
    ("labels", "found"),
    [
        (np.array([[1.5], [2.5]], np.float32), [1.5, 2.5]),
        (np.array([[0, 1, 1], [1, 0, 0]], np.float32), [[0.0, 1.0, 1.0], [1.0, 0.0, 0.0]]),
        (np.array([[0, 1], [1, 0]], np.int32), [[0.0, 1.0], [1.0, 0.0]]),
        (np.array([[-100, 1, 2, -100], [-100, 3, -100, 9]], np.int64), [[-100, 1, 2, -100], [-100, 3, -100]]),
        (np.array([True, False]), [1, 0]),
    ],
)
def test_kinds_of_labels(labels, found):
    columns = {
        "input_ids": np.array([[5, 6, 7, 8], [5, 6, 7, 0]], np.int32),
        "attention_mask": np.array([[1, 1, 1, 1], [1, 1, 1, 0]], np.int32),
        "targets": labels,
    }
    features = features_from_mindspore(ds.NumpySlicesDataset(columns, shuffle=False), label_column="targets")
    assert [row["labels"] for row in plain(features)] == found
    assert "targets" not in features[0]


def test_without_mask_and_labels_and_with_other_columns():
    columns = {
        "input_ids": np.array([[5, 6], [7, 8]]),
        "start_positions": np.array([1, 0]),
        "text": np.array(["a", "b"]),
    }
    features = features_from_mindspore(ds.NumpySlicesDataset(columns, shuffle=False))
    assert plain(features)[0] == {"input_ids": [5, 6], "attention_mask": [1, 1], "start_positions": 1}


def test_errors(tokenizer):
    texts = ds.GeneratorDataset([("a", 1), ("b", 2)], ["sentence", "label"], shuffle=False)
    with pytest.raises(InputError, match="no column 'input_ids'; its columns are sentence, label"):
        features_from_mindspore(texts)
    with pytest.raises(InputError, match="no column 'text'; its columns are sentence, label"):
        encode_mindspore(texts, tokenizer)
    with pytest.raises(InputError, match="no column 'y'; its columns are sentence, label"):
        encode_mindspore(texts, tokenizer, text_column="sentence", label_column="y")
    with pytest.raises(InputError, match="data set, line 2: unknown label '2'"):
        encode_mindspore(texts, tokenizer, text_column="sentence", labels=["1"])
    named = ds.NumpySlicesDataset({"input_ids": [[1, 2]], "label": ["x"]}, shuffle=False)
    with pytest.raises(InputError, match=r"column 'labels' of the data set holds <U1, not numbers"):
        features_from_mindspore(named)


def test_table_numbers_its_rows():
    data = ds.GeneratorDataset([("a", 1.5), ("b", 2.5)], ["text", "score"], shuffle=False)
    table = table_from_mindspore(data)
    assert [(row.line, row.values) for row in table.rows] == [
        (1, {"text": "a", "score": 1.5}),
        (2, {"text": "b", "score": 2.5}),
    ]
