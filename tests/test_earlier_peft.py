"""Adapters that earlier releases of PEFT wrote (scripts/peft_versions_oracle.py), opened here."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from mindpeft import PeftModel
from mindpeft.errors import InputError
from tests.tuners.adapterhub import logits, make_base

DATA = Path(__file__).parent / "tuners" / "data" / "peft_versions"
FOLDERS = sorted(path for path in DATA.glob("*/*") if path.is_dir())
# OFT was another method until PEFT 0.16.
REFUSED = {
    ("0.14.0", "oft"): "missing from the file: .*oft_R",
    **{(release, "oft"): "from before PEFT 0.14" for release in ("0.7.1", "0.10.0", "0.12.0")},
}
# What no longer means what it did, and what is said of it.
CHANGED = {
    ("0.16.0", "oft"): "from PEFT before 0.18",
    **{(release, "lokr"): "from PEFT before 0.14" for release in ("0.7.1", "0.10.0", "0.12.0")},
    **{(release, "lora"): "lacks the trained values of" for release in ("0.10.0", "0.12.0", "0.14.0")},
}
APPROXIMATE = {("0.16.0", "oft")}


@pytest.fixture(scope="module")
def base() -> np.ndarray:
    """What the model says without an adapter."""
    return logits(make_base())


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda path: f"{path.parent.name}-{path.name}")
def test_logits_are_those_of_the_release(folder, base, caplog):
    case = folder.parent.name, folder.name
    reason = REFUSED.get(case)
    if reason is not None:
        with pytest.raises(InputError, match=reason):
            PeftModel.from_pretrained(make_base(), folder)
        return
    model = PeftModel.from_pretrained(make_base(), folder).set_train(False)
    assert CHANGED.get(case, "") in caplog.text
    expected = load_file(folder.parent / "expected.safetensors")[folder.name]
    found = logits(model)
    np.testing.assert_allclose(found, expected, atol=0.2 if case in APPROXIMATE else 1e-5)
    assert np.abs(found - base).max() > 1e-4
