"""docs/methods.md: what each method was measured to do, written by the parity tests themselves.

    python scripts/method_matrix.py                # the tests of every run, on tiny models
    python scripts/method_matrix.py -m "slow or not slow"   # MiniLM and all heads too

Runs tests/parity/test_methods.py (arguments are passed on to pytest), and writes the table only if it passes.
Needs the test extra.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections import defaultdict
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
DOCUMENT = ROOT / "docs" / "methods.md"
BEGIN, END = "<!-- table: scripts/method_matrix.py -->", "<!-- end of table -->"
COLUMNS = ("peft → read, forward", "gradient", "curve", "write → peft", "merge")


def measure(arguments: list[str]) -> list[dict]:
    """Run the tests and return what they noted down."""
    with tempfile.TemporaryDirectory() as scratch:
        notes = Path(scratch) / "notes.jsonl"
        command = [sys.executable, "-m", "pytest", "-q", "tests/parity/test_methods.py", *arguments]
        subprocess.run(command, cwd=ROOT, env={**os.environ, "MINDPEFT_MATRIX": str(notes)}, check=True)
        return [json.loads(line) for line in notes.read_text(encoding="utf-8").splitlines()]


def table(notes: list[dict]) -> str:
    """A row for each case: the largest error over heads and models, and the heads."""
    worst: dict[str, dict[str, float]] = defaultdict(dict)
    heads: dict[str, set[str]] = defaultdict(set)
    for note in notes:
        errors = worst[note["case"]]
        errors[note["what"]] = max(note["error"], errors.get(note["what"], 0.0))
        heads[note["case"]].add(note["head"])
    lines = [f"| method | {' | '.join(COLUMNS)} | heads |", "|---" * (len(COLUMNS) + 2) + "|"]
    for case, errors in worst.items():
        cells = [f"{errors[column]:.0e}" if column in errors else "-" for column in COLUMNS]
        lines.append(f"| {case} | {' | '.join(cells)} | {', '.join(sorted(heads[case]))} |")
    return "\n".join(lines)


def main() -> None:
    written = table(measure(sys.argv[1:]))
    text = DOCUMENT.read_text(encoding="utf-8")
    before, _, rest = text.partition(BEGIN)
    after = rest.partition(END)[2]
    DOCUMENT.write_text(f"{before}{BEGIN}\n\n{written}\n\n{END}{after}", encoding="utf-8")


if __name__ == "__main__":
    main()
