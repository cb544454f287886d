"""First sentences are clean prose; nothing is run to find them."""

from __future__ import annotations

import sys

import pytest

from mindpeft.data.docstrings import extension_docstrings, first_sentence, source_docstrings


@pytest.mark.parametrize(
    ("docstring", "sentence"),
    [
        ("Return the number of\n    rows. Not the columns.", "Return the number of rows."),
        ("Return a list of names\n\nMore text here.", "Return a list of names"),
        (
            "accept() -> (socket object, address info)\n\nWait for an incoming call.",
            "Wait for an incoming call.",
        ),
        ("Return the greatest, e.g. Infinity. Then stop.", "Return the greatest, e.g. Infinity."),
        ("Too short.", None),
        ("lower case is a fragment.", None),
        (">>> print(1 + 1 + 1)\n3", None),
        ("Example::\n\n  code here that goes on", None),
        ("Set a=1 and b=2 for all rows.", None),
        ("x * y + z - 17 / 4 (mod 12)", None),
        ("", None),
    ],
)
def test_first_sentence(docstring, sentence):
    assert first_sentence(docstring) == sentence


def test_source_of_modules_and_packages():
    assert any("Serialize ``obj``" in text for text in source_docstrings("json"))
    assert any("Heap queue algorithm" in text for text in source_docstrings("heapq"))
    assert list(source_docstrings("no_such_module")) == []


def test_source_is_not_run():
    sys.modules.pop("antigravity", None)  # opens a browser when imported
    list(source_docstrings("antigravity"))
    assert "antigravity" not in sys.modules


def test_extension_modules():
    found = list(extension_docstrings("zlib"))
    assert any("compress" in text for text in found)
    assert all("int([x])" not in text for text in extension_docstrings("zlib"))  # constants don't count
    assert list(extension_docstrings("no_such_module")) == []
