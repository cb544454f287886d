"""Which cases of a test run by default; the slow run has all of them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest


def default(names: Iterable[str], *shown: str) -> list[Any]:
    """The names as parameters, slow but for those shown."""
    return [pytest.param(name, marks=() if name in shown else pytest.mark.slow) for name in names]
