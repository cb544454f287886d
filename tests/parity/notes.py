"""What parity tests measure, put down for the table of methods.

Each measurement goes, as a line of JSON, into the file that ``MINDPEFT_MATRIX`` names, if it is set:
``scripts/method_matrix.py`` makes docs/methods.md of it.
"""

from __future__ import annotations

import json
import os


def note(case: str, what: str, **values: object) -> None:
    """Put down a line about a case: what was measured, or why it was not."""
    path = os.environ.get("MINDPEFT_MATRIX")
    if path:
        with open(path, "a", encoding="utf-8") as file:
            file.write(json.dumps({"case": case, "what": what, **values}) + "\n")


def assert_small(case: str, base: str, head: str, what: str, error: float, limit: float) -> None:
    """Fail if an error is above its limit, and note it down otherwise."""
    assert error <= limit, f"{what}: {error:.2e}"
    note(case, what, base=base, head=head, error=error)
