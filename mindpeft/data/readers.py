"""Tables from files: CSV, TSV, JSON, JSON lines and plain text. Each row knows the line on which it began."""

from __future__ import annotations

import csv
import io
import json
import os
import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mindpeft.errors import InputError, did_you_mean

FORMATS = {".csv": "csv", ".tsv": "tsv", ".json": "json", ".jsonl": "jsonl", ".txt": "text"}
DELIMITED = {"csv": ",", "tsv": "\t"}


@dataclass(frozen=True)
class Row:
    """One row: the line of the file on which it began (counted from 1), and column name -> value."""

    line: int
    values: dict[str, Any]


@dataclass(frozen=True)
class Table:
    """Rows with named columns.

    Attributes:
        source: where the rows come from, for error messages: a path as a rule.
        columns: all column names, in the order of the file. A JSON row may lack some.
        rows: the rows; never empty.
        encoding: the character encoding that the file was read with.
    """

    source: str
    columns: tuple[str, ...]
    rows: list[Row]
    encoding: str = "utf-8"

    def require(self, column: str) -> None:
        """Raise InputError, with the nearest name, unless there is such a column."""
        if column not in self.columns:
            raise InputError(
                f"{self.source} has no column {column!r}; its columns are {', '.join(self.columns)}"
                f"{did_you_mean(column, self.columns)}"
            )

    def error(self, row: Row, message: str) -> InputError:
        """The error ``message`` with the place of ``row`` before it."""
        return InputError(f"{self.source}, line {row.line}: {message}")


def read_table(
    path: str | os.PathLike,
    *,
    format: str | None = None,
    encoding: str | None = None,
    delimiter: str | None = None,
    header: bool | None = None,
    columns: Sequence[str] | None = None,
) -> Table:
    """Read a table from a file.

    Args:
        path: the file.
        format: ``"csv"`` (quotes as usual), ``"tsv"`` (quotes are ordinary characters, as in GLUE),
            ``"json"`` (an array of objects, or an object a line), ``"jsonl"`` or ``"text"`` (one column,
            ``text``, a text a line); by the file's extension if None.
        encoding: any Python codec; if None: UTF-8 with or without a byte order mark, else GB18030.
        delimiter: what separates the fields of CSV and TSV, one character.
        header: whether the first row of CSV and TSV names the columns; if None: unless ``columns`` is given.
        columns: names of the columns of CSV and TSV; they replace the header's if there is one too.

    Raises:
        InputError: the file is missing, empty, undecodable or malformed; the message names file and line.
    """
    path = Path(path)
    format = _format(path, format)
    if format not in DELIMITED and not (delimiter is None and header is None and columns is None):
        raise InputError(f"delimiter, header and columns are for CSV and TSV files, but {path} is {format}")
    text, encoding = _decode(path, _read(path), encoding)
    if format in DELIMITED:
        header = columns is None if header is None else header
        return _delimited(path, text, encoding, format, delimiter or DELIMITED[format], header, columns)
    reader = {"json": _json_rows, "jsonl": _json_lines, "text": _text_lines}[format]
    rows = list(reader(path, text))
    if not rows:
        raise InputError(f"{path} is empty: it has no rows")
    return Table(str(path), tuple(dict.fromkeys(name for row in rows for name in row.values)), rows, encoding)


def _format(path: Path, format: str | None) -> str:
    if format is None:
        format = FORMATS.get(path.suffix.lower())
        if format is None:
            raise InputError(
                f"can't tell the format of {path} by its extension: use {', '.join(FORMATS)}, or say"
            )
    if format not in FORMATS.values():
        known = FORMATS.values()
        raise InputError(
            f"unknown format {format!r}: use one of {', '.join(known)}{did_you_mean(format, known)}"
        )
    return format


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except FileNotFoundError as error:
        raise InputError(f"no such file: {path}") from error
    except OSError as error:
        raise InputError(f"can't read {path}: {error.strerror}") from error


def _decode(path: Path, data: bytes, encoding: str | None) -> tuple[str, str]:
    """(text, encoding). UTF-8 is tried strictly, so GB18030 is taken only where UTF-8 is impossible."""
    candidates = ["utf-8-sig", "gb18030"] if encoding is None else [encoding]
    failure = None
    for candidate in candidates:
        try:
            return data.decode(candidate), candidate.replace("-sig", "")
        except LookupError as error:
            raise InputError(f"unknown encoding {encoding!r} for {path}: use utf-8, gb18030, ...") from error
        except UnicodeDecodeError as error:
            failure = failure or error
    line = data.count(b"\n", 0, failure.start) + 1
    tried = "UTF-8 or GB18030" if encoding is None else encoding
    raise InputError(f"{path}, line {line}: not {tried}: byte {failure.start} is 0x{data[failure.start]:02x}")


def _delimited(
    path: Path,
    text: str,
    encoding: str,
    format: str,
    delimiter: str,
    header: bool,
    columns: Sequence[str] | None,
) -> Table:
    if len(delimiter) != 1:
        raise InputError(f"the delimiter of {path} must be one character, not {delimiter!r}")
    records = (_quoted_records if format == "csv" else _plain_records)(path, text, delimiter)
    first = next(records, None) if header else None
    if columns is None and first is None:
        raise InputError(
            f"{path} is empty: it has no header and no rows"
            if header
            else f"{path} has no header: name its columns with columns"
        )
    names = tuple(first[1] if columns is None else columns)
    if len(set(names)) < len(names) or "" in names:
        raise InputError(f"{path}: column names must differ and not be empty: {', '.join(map(repr, names))}")
    rows = []
    for line, fields in records:
        if len(fields) != len(names):
            raise InputError(
                f"{path}, line {line}: {len(fields)} fields, "
                f"but there are {len(names)} columns: {', '.join(names)}"
            )
        rows.append(Row(line, dict(zip(names, fields, strict=True))))
    if not rows:
        raise InputError(f"{path} has no rows{' below its header' if header else ': it is empty'}")
    return Table(str(path), names, rows, encoding)


def _quoted_records(path: Path, text: str, delimiter: str) -> Iterator[tuple[int, list[str]]]:
    """(first line, fields) of each record of CSV; a quoted field may hold line ends."""
    csv.field_size_limit(sys.maxsize)
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    while True:
        line = reader.line_num + 1
        try:
            fields = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            raise InputError(f"{path}, line {line}: malformed CSV: {error}") from error
        if fields:
            yield line, fields


def _plain_records(path: Path, text: str, delimiter: str) -> Iterator[tuple[int, list[str]]]:
    """(line, fields) of each line that is not empty; no character but the delimiter has a meaning."""
    for line, content in enumerate(_lines(text), 1):
        if content:
            yield line, content.split(delimiter)


def _lines(text: str) -> list[str]:
    """The lines of ``text`` as editors count them (``str.splitlines`` also breaks at U+2028 and others)."""
    return [line.removesuffix("\r") for line in text.split("\n")]


def _text_lines(path: Path, text: str) -> Iterator[Row]:
    for line, content in enumerate(_lines(text), 1):
        if content.strip():
            yield Row(line, {"text": content})


def _json_lines(path: Path, text: str) -> Iterator[Row]:
    for line, content in enumerate(_lines(text), 1):
        if content.strip():
            try:
                yield _json_row(path, line, json.loads(content))
            except (json.JSONDecodeError, RecursionError) as error:
                raise InputError(f"{path}, line {line}: not valid JSON: {error}") from error


def _json_rows(path: Path, text: str) -> Iterator[Row]:
    """The objects of an array, each parsed alone so that its line is known."""
    if text.lstrip().startswith("{"):
        yield from _json_lines(path, text)
        return
    decoder, space = json.JSONDecoder(), re.compile(r"\s*")
    at = space.match(text).end()
    if at == len(text):
        return
    if text[at] != "[":
        raise InputError(f"{path}, line {_line_of(text, at)}: a JSON file must hold an array of objects")
    at, line, counted = space.match(text, at + 1).end(), 1, 0
    if text[at : at + 1] == "]":
        return
    while True:
        line, counted = line + text.count("\n", counted, at), at
        try:
            value, at = decoder.raw_decode(text, at)
        except json.JSONDecodeError as error:
            raise InputError(f"{path}, line {error.lineno}: not valid JSON: {error.msg}") from error
        except RecursionError as error:
            raise InputError(f"{path}, line {line}: not valid JSON: nested too deeply") from error
        yield _json_row(path, line, value)
        at = space.match(text, at).end()
        if text[at : at + 1] != ",":
            break
        at = space.match(text, at + 1).end()
    if text[at : at + 1] != "]" or text[at + 1 :].strip():
        raise InputError(f"{path}, line {_line_of(text, at)}: not valid JSON: expected ',' or a last ']'")


def _line_of(text: str, at: int) -> int:
    return text.count("\n", 0, at) + 1


def _json_row(path: Path, line: int, value: Any) -> Row:
    if not isinstance(value, dict):
        raise InputError(f"{path}, line {line}: a row must be a JSON object, not {json.dumps(value)[:40]}")
    return Row(line, value)
