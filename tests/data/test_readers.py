"""Files are read as written, and every malformed one is refused with its place."""

from __future__ import annotations

import json

import pytest

from mindpeft.data.readers import read_table
from mindpeft.errors import InputError


@pytest.fixture
def write(tmp_path):
    """Write a file of the given name and content (text as UTF-8, or bytes) and return its path."""

    def write(name, content):
        path = tmp_path / name
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return path

    return write


def rows(table):
    return [(row.line, *row.values.values()) for row in table.rows]


def test_csv_with_quotes_and_line_ends_in_fields(write):
    path = write("a.csv", 'text,label\r\n"one, ""two""\r\nthree",x\r\n\r\nfour,y\r\n')
    table = read_table(path)
    assert table.columns == ("text", "label")
    assert rows(table) == [(2, 'one, "two"\r\nthree', "x"), (5, "four", "y")]


def test_tsv_takes_quotes_as_characters(write):
    path = write("a.tsv", 'text\tlabel\n"unbalanced\t1\nsecond" \u2028 line\t0\n')
    assert rows(read_table(path)) == [(2, '"unbalanced', "1"), (3, 'second" \u2028 line', "0")]


def test_columns_for_a_file_without_header(write):
    path = write("a.tsv", "good\t1\nbad\t0\n")
    table = read_table(path, columns=["text", "label"])
    assert table.columns == ("text", "label")
    assert rows(table) == [(1, "good", "1"), (2, "bad", "0")]
    assert rows(read_table(path, columns=["text", "label"], header=True)) == [(2, "bad", "0")]


def test_other_delimiter_and_format(write):
    assert rows(read_table(write("a.csv", "t;l\nx,y;1\n"), delimiter=";")) == [(2, "x,y", "1")]
    assert rows(read_table(write("a.dat", "t,l\nx,1\n"), format="csv")) == [(2, "x", "1")]


def test_json_array_with_line_numbers(write):
    values = [{"text": "a\nb", "label": 1}, {"text": "二", "label": [1, 2]}, {"text": "c"}]
    path = write("a.json", "\n" + json.dumps(values, indent=1, ensure_ascii=False))
    table = read_table(path)
    assert [row.values for row in table.rows] == values
    lines = path.read_text().split("\n")
    assert [row.line for row in table.rows] == [n for n, line in enumerate(lines, 1) if line == " {"]
    assert table.columns == ("text", "label")


@pytest.mark.parametrize("name", ["a.jsonl", "a.json"])
def test_json_lines(write, name):
    table = read_table(write(name, '{"a": 1}\n\n{"a": "\\u4e8c", "b": null}\r\n'))
    assert [(row.line, row.values) for row in table.rows] == [(1, {"a": 1}), (3, {"a": "二", "b": None})]


def test_text_lines(write):
    assert rows(read_table(write("a.txt", "one\n\n two \n"))) == [(1, "one"), (3, " two ")]


@pytest.mark.parametrize(
    ("codec", "found"),
    [("utf-8", "utf-8"), ("utf-8-sig", "utf-8"), ("gb18030", "gb18030"), ("gbk", "gb18030")],
)
def test_encodings_are_found(write, codec, found):
    table = read_table(write("a.csv", "文本,label\n我爱北京天安门，,好\n".encode(codec)))
    assert table.columns == ("文本", "label")
    assert rows(table) == [(2, "我爱北京天安门，", "好")]
    assert table.encoding == found


def test_encoding_given(write):
    content = "text,label\ncafé,x\n"
    assert rows(read_table(write("a.csv", content.encode("utf-16")), encoding="utf-16")) == [(2, "café", "x")]
    assert rows(read_table(write("a.csv", content.encode("latin-1")), encoding="latin-1")) == [
        (2, "café", "x")
    ]


def test_very_long_field(write):
    assert len(read_table(write("a.csv", f"text\n{'x' * 200_000}\n")).rows[0].values["text"]) == 200_000


BAD = [
    ("ragged.csv", "a,b\n1,2\n1,2,3\n", {}, r"ragged.csv, line 3: 3 fields, but there are 2 columns: a, b"),
    ("short.csv", 'a,b\n"x\ny",2\n1\n', {}, r"short.csv, line 4: 1 fields, but there are 2 columns"),
    ("ragged.tsv", "a\tb\n1\t2\n1\n", {}, r"ragged.tsv, line 3: 1 fields, but there are 2 columns"),
    ("open.csv", 'a,b\n1,2\n"x,2\n3,4\n', {}, r"open.csv, line 3: malformed CSV: unexpected end of data"),
    ("quote.csv", 'a,b\n"x"y,2\n', {}, r"quote.csv, line 2: malformed CSV: ',' expected after '\"'"),
    ("empty.csv", "", {}, r"empty.csv is empty"),
    ("empty.tsv", "\n\n", {}, r"empty.tsv is empty"),
    ("header.csv", "a,b\n", {}, r"header.csv has no rows below its header"),
    ("none.csv", "\n", {"columns": ["a"]}, r"none.csv has no rows: it is empty"),
    ("twice.csv", "a,a\n1,2\n", {}, r"column names must differ and not be empty: 'a', 'a'"),
    ("nameless.csv", "a,\n1,2\n", {}, r"column names must differ and not be empty: 'a', ''"),
    ("names.csv", "1,2\n", {"columns": ["a"]}, r"names.csv, line 1: 2 fields, but there are 1 columns: a"),
    ("plain.csv", "1,2\n", {"header": False}, r"plain.csv has no header: name its columns with columns"),
    ("wide.csv", "a\n1\n", {"delimiter": "::"}, r"delimiter of .*wide.csv must be one character, not '::'"),
    ("bad.jsonl", '{"a": 1}\n{"a": }\n', {}, r"bad.jsonl, line 2: not valid JSON: Expecting value"),
    ("deep.jsonl", "[" * 100_000 + "\n", {}, r"deep.jsonl, line 1: not valid JSON"),
    (
        "list.jsonl",
        '{"a": 1}\n\n[1, 2]\n',
        {},
        r"list.jsonl, line 3: a row must be a JSON object, not \[1, 2\]",
    ),
    ("empty.jsonl", "\n", {}, r"empty.jsonl is empty: it has no rows"),
    ("empty.json", "[]", {}, r"empty.json is empty: it has no rows"),
    ("blank.json", " \n", {}, r"blank.json is empty: it has no rows"),
    ("word.json", '\n"text"', {}, r"word.json, line 2: a JSON file must hold an array of objects"),
    ("comma.json", '[\n{"a": 1}\n{"a": 2}]', {}, r"comma.json, line 3: not valid JSON: expected ','"),
    ("cut.json", '[\n{"a": 1},\n{"a"', {}, r"cut.json, line 3: not valid JSON: Expecting ':'"),
    ("open.json", '[{"a": 1}\n', {}, r"open.json, line 2: not valid JSON: expected ',' or a last ']'"),
    ("after.json", '[{"a": 1}]\n[', {}, r"after.json, line 1: not valid JSON"),
    ("number.json", '[{"a": 1},\n\n 5]', {}, r"number.json, line 3: a row must be a JSON object, not 5"),
    ("bytes.csv", b"a,b\n1,2\n\xff\xff,2\n", {}, r"bytes.csv, line 3: not UTF-8 or GB18030: byte 8 is 0xff"),
    ("gb.csv", "a\n文\n".encode("gbk"), {"encoding": "utf-8"}, r"gb.csv, line 2: not utf-8: byte 2 is 0xce"),
    ("codec.csv", "a\n1\n", {"encoding": "utf-88"}, r"unknown encoding 'utf-88' for .*codec.csv"),
    ("data.parquet", "x", {}, r"can't tell the format of .*data.parquet by its extension"),
    ("format.csv", "a\n1\n", {"format": "jsonlines"}, r"unknown format 'jsonlines': .*did you mean 'jsonl'"),
    ("options.jsonl", "{}", {"columns": ["a"]}, r"columns are for CSV and TSV files, but .* is jsonl"),
]


@pytest.mark.parametrize(("name", "content", "options", "message"), BAD, ids=[case[0] for case in BAD])
def test_malformed_files(write, name, content, options, message):
    with pytest.raises(InputError, match=message):
        read_table(write(name, content), **options)


def test_missing_file_and_folder(tmp_path):
    with pytest.raises(InputError, match=r"no such file: .*absent.csv"):
        read_table(tmp_path / "absent.csv")
    (tmp_path / "folder.csv").mkdir()
    with pytest.raises(InputError, match=r"can't read .*folder.csv: Is a directory"):
        read_table(tmp_path / "folder.csv")


def test_missing_column_names_the_nearest(write):
    table = read_table(write("a.csv", "sentence,label\nx,1\n"))
    with pytest.raises(
        InputError, match=r"no column 'sentense'; .* sentence, label; did you mean 'sentence'\?"
    ):
        table.require("sentense")


@pytest.mark.parametrize(
    ("name", "options", "count"),
    [
        ("banking77/test.csv", {}, 3080),
        ("chnsenticorp/test.tsv", {}, 1200),
        ("sst2_small/dev.tsv", {"columns": ["text", "label"]}, 872),
        ("eprstmt_zh/test_public.json", {}, 610),
        ("instructions/identity.json", {}, 91),
    ],
)
def test_real_files(shared_dir, name, options, count):
    assert len(read_table(shared_dir / "data" / name, **options).rows) == count
