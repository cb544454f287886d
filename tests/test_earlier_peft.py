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
# What cannot be computed any more, or not here, and why the reader is told so.
REFUSED = {
    ("0.7.1", "oft"): "",
    ("0.10.0", "oft"): "",
    ("0.12.0", "oft"): "",
    ("0.14.0", "oft"): "",
    ("0.14.0", "bone"): "",
    ("0.16.0", "bone"): "",
    ("0.18.1", "bone"): "",
}


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda path: f"{path.parent.name}-{path.name}")
def test_logits_are_those_of_the_release(folder):
    reason = REFUSED.get((folder.parent.name, folder.name))
    if reason is not None:
        with pytest.raises(InputError, match=reason):
            PeftModel.from_pretrained(make_base(), folder)
        return
    model = PeftModel.from_pretrained(make_base(), folder).set_train(False)
    expected = load_file(folder.parent / "expected.safetensors")[folder.name]
    found = logits(model)
    np.testing.assert_allclose(found, expected, atol=1e-5)
    assert np.abs(found - logits(make_base())).max() > 1e-4
