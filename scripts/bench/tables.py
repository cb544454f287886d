"""Tables in documents that a benchmark fills in, row by row."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
END = "<!-- end of table -->"


def begin_of(script: str) -> str:
    """The line before the table of a script."""
    return f"<!-- table: scripts/bench/{script} -->"


def write_rows(document: str, script: str, head: str, rows: dict[str, str], order: Iterable[str]) -> None:
    """Put rows into a script's table in a document; the others stay.

    Args:
        document: its path in the repository.
        script: the script's file name; the table stands between ``begin_of`` it and ``END``.
        head: the line with the columns' heads.
        rows: by the text of their first column.
        order: of the first columns; rows that it lacks are taken out.
    """
    path, begin = ROOT / document, begin_of(script)
    before, _, rest = path.read_text(encoding="utf-8").partition(begin)
    table, _, after = rest.partition(END)
    kept = {line.split(" | ")[0].removeprefix("| "): line for line in table.splitlines()[3:] if line}
    lines = [line for name in order if (line := {**kept, **rows}.get(name))]
    text = "\n".join([head, "|---" * (head.count("|") - 1) + "|", *lines])
    path.write_text(f"{before}{begin}\n{text}\n{END}{after}", encoding="utf-8")
