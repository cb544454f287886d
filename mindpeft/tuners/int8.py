"""What adapters can't do to a layer whose weight is int8."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from mindpeft.errors import InputError
from mindpeft.nn.int8 import Int8Linear
from mindpeft.parameters import Place

if TYPE_CHECKING:
    from mindpeft.tuners.plan import Plan


def check_int8(plan: Plan, places: Mapping[str, Place]) -> None:
    """Raise ``InputError`` if a plan changes weights of int8, or trains them.

    Args:
        places: the base model's parameters by their names.
    """
    for path, kind in plan.classes.items():
        # Parts taken out of the weight (PiSSA), and target_parameters
        changes = kind.takes_out(plan.sites[path]) or hasattr(kind, "PARAMETERS")
        if changes and isinstance(plan.sites[path].cell, Int8Linear):
            raise _refusal(path, "change")
    for name in sorted(plan.replaced):
        if isinstance(places[name].cell, Int8Linear) and places[name].attribute != "bias":
            raise _refusal(name, "train")


def check_merge_int8(plan: Plan) -> None:
    """Raise ``InputError`` if merging would write to weights of int8."""
    for path, site in plan.sites.items():
        if isinstance(site.cell, Int8Linear):
            raise _refusal(path, "merge into")


def _refusal(name: str, verb: str) -> InputError:
    return InputError(f"can't {verb} {name!r}, which is int8; open the base model in float32 or bfloat16")
