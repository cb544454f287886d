"""The one exception for mistakes that a user can mend, and the hint that names the nearest valid word."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class InputError(ValueError):
    """A user's mistake: a bad file, name or value.

    The message is one sentence that says what was wrong, where, and what is allowed. The command line prints
    it without a stack trace and exits with code 2.
    """


def did_you_mean(name: str, choices: Iterable[str]) -> str:
    """Return ``"; did you mean 'x'?"`` for the choice nearest to ``name``, or ``""`` if none is near."""
    near = difflib.get_close_matches(str(name), [str(choice) for choice in choices], n=1, cutoff=0.6)
    return f"; did you mean {near[0]!r}?" if near else ""
