"""SHiRA."""

from tests.parity.case import Case

CASES = [
    Case("SHiRA", "ShiraConfig", {"target_modules": ["query", "value", "dense"], "r": 4}, rate=5e-3),
]
