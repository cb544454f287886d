"""WaveFT."""

from tests.parity.case import Case

_TARGETS = {"target_modules": ["query", "value", "dense"], "n_frequency": 60}

CASES = [
    Case("WaveFT", "WaveFTConfig", {**_TARGETS, "wavelet_family": "sym4", "scaling": 2.0}, rate=2e-2),
]
