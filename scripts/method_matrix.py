"""docs/methods.md: what each method was measured to do, written by the parity tests themselves.

    python scripts/method_matrix.py                         # the tests of every run, on tiny models
    python scripts/method_matrix.py -m "slow or not slow"   # MiniLM and all heads too

Runs tests/parity/test_methods.py and test_adapterhub.py (arguments are passed on to pytest), and writes the
table only if they pass. Needs the test extra. A long run can be had in parts: `--notes FILE` adds to what
earlier runs put into that file, and the table is of all of them.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections import defaultdict
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
DOCUMENT = ROOT / "docs" / "methods.md"
BEGIN, END = "<!-- table: scripts/method_matrix.py -->", "<!-- end of table -->"
TESTS = ("tests/parity/test_methods.py", "tests/parity/test_adapterhub.py")
COLUMNS = ("forward", "gradient", "curve", "write → oracle", "oracle → read", "merge")
HEADS, BASES = ("sequence", "token", "masked"), ("tiny", "minilm")
ORACLES = ("PEFT", "torch", "AdapterHub")
PACKAGES = ("mindspore", "torch", "transformers", "peft")


@dataclass
class Row:
    """What was noted down of one case."""

    method: str = ""
    oracle: str = ""
    why: dict[str, str] = field(default_factory=dict)
    errors: dict[str, float] = field(default_factory=dict)
    heads: set[str] = field(default_factory=set)
    bases: set[str] = field(default_factory=set)

    def take(self, note: dict) -> None:
        """Add a line of the tests' notes."""
        if note["what"] == "about":
            self.method, self.oracle, self.why = note["method"], note["oracle"], note["why"]
            return
        self.errors[note["what"]] = max(note["error"], self.errors.get(note["what"], 0.0))
        self.heads.add(note["head"])
        self.bases.add(note["base"])


def measure(arguments: list[str], notes: Path) -> list[dict]:
    """Run the tests and return all that is noted down."""
    command = [sys.executable, "-m", "pytest", "-q", *TESTS, *arguments]
    subprocess.run(command, cwd=ROOT, env={**os.environ, "MINDPEFT_MATRIX": str(notes)}, check=True)
    return [json.loads(line) for line in notes.read_text(encoding="utf-8").splitlines()]


def rows_of(notes: list[dict]) -> dict[str, Row]:
    """The notes by case."""
    rows: dict[str, Row] = defaultdict(Row)
    for note in notes:
        rows[note["case"]].take(note)
    return rows


def table(rows: dict[str, Row]) -> str:
    """A line for each case: the largest errors over heads and bases; below, what is missing and why."""
    footnotes: dict[str, int] = {}

    def mark(row: Row, key: str) -> str:
        if key not in row.why:
            return ""
        return f"<sup>{footnotes.setdefault(row.why[key], len(footnotes) + 1)}</sup>"

    def cell(row: Row, key: str) -> str:
        if key in row.errors:
            return f"{row.errors[key]:.0e}"
        return f"-{mark(row, key)}" if key in row.why else "not run"

    header = ("method", "oracle", *COLUMNS, "parameters", "heads", "bases")
    lines = [f"| {' | '.join(header)} |", "|---" * len(header) + "|"]
    for name, row in sorted(rows.items(), key=lambda item: (ORACLES.index(item[1].oracle), item[1].method)):
        errors = [cell(row, key) for key in COLUMNS]
        equal = "equal" if "parameters" in row.errors else "not run"
        heads = ", ".join(head for head in HEADS if head in row.heads) + mark(row, "heads")
        bases = ", ".join(base for base in BASES if base in row.bases) + mark(row, "bases")
        lines.append(f"| {name} | {row.oracle} | {' | '.join(errors)} | {equal} | {heads} | {bases} |")
    lines.append("")
    lines += [f"{number}. {text}" for text, number in footnotes.items()]
    return "\n".join(lines)


def missing(rows: dict[str, Row]) -> list[str]:
    """The methods that `mindpeft methods` lists, and no case measures."""
    from mindpeft.config import supported_methods

    return sorted({method.value for method in supported_methods()} - {row.method for row in rows.values()})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--notes", type=Path, help="a file that the tests' notes are added to")
    options, arguments = parser.parse_known_args()
    with tempfile.TemporaryDirectory() as scratch:
        rows = rows_of(measure(arguments, options.notes or Path(scratch) / "notes.jsonl"))
    versions = ", ".join(f"{package} {version(package)}" for package in PACKAGES)
    absent = missing(rows)
    parts = [f"Measured with {versions}.", table(rows)]
    if absent:
        parts.append(f"Not measured: {', '.join(absent)}.")
    written = "\n\n".join(parts)
    text = DOCUMENT.read_text(encoding="utf-8")
    before, _, rest = text.partition(BEGIN)
    after = rest.partition(END)[2]
    DOCUMENT.write_text(f"{before}{BEGIN}\n\n{written}\n\n{END}{after}", encoding="utf-8")


if __name__ == "__main__":
    main()
