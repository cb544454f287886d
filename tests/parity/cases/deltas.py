"""Methods that scale a cell or add a delta of their own kind to it."""

from tests.parity.case import Case

_TARGETS = {"target_modules": ["query", "value", "dense"]}

CASES = [
    Case("(IA)3", "IA3Config", {**_TARGETS, "feedforward_modules": ["dense"]}, rate=1e-2),
    Case("VeRA", "VeraConfig", {**_TARGETS, "r": 16}, rate=1e-2),
    Case("LoHa", "LoHaConfig", {**_TARGETS, "r": 4, "alpha": 8, "init_weights": False}, rate=5e-3),
    Case("LoKr", "LoKrConfig", {**_TARGETS, "r": 2, "decompose_factor": 4, "init_weights": False}, rate=5e-3),
    Case("OFT", "OFTConfig", {**_TARGETS, "oft_block_size": 8}, rate=5e-3),
    Case("BOFT", "BOFTConfig", {**_TARGETS, "boft_block_size": 8}, rate=5e-3),
    Case("HRA", "HRAConfig", {**_TARGETS, "r": 4}, rate=5e-3),
    Case("FourierFT", "FourierFTConfig", {**_TARGETS, "n_frequency": 60, "scaling": 20.0}, rate=2e-2),
    Case("MiSS", "MissConfig", {**_TARGETS, "r": 4}, rate=2e-3),
    Case("MiSS, Bat", "MissConfig", {**_TARGETS, "r": 4, "init_weights": "bat"}, rate=2e-3),
    Case("RoAd", "RoadConfig", {**_TARGETS, "group_size": 8}, rate=1e-2),
    Case("BEFT", "BeftConfig", {"target_modules": ["value", "dense"]}, rate=1e-2),
]
