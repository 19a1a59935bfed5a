"""Settings that are none are refused where they are set."""

from __future__ import annotations

import math
from collections.abc import Collection

from .errors import AdapterLabError


def require_choice(name: str, value: str, known: Collection[str]) -> None:
    """Refuse a value of the field ``name`` that is not ``known``."""
    if value not in known:
        raise AdapterLabError(f"Unknown {name} '{value}'", expected=f"one of {', '.join(known)}")


def require_range(name: str, value: float, least: float, most: float = math.inf) -> None:
    """Refuse a value of the field ``name`` outside of both bounds, which are allowed if finite."""
    if not least <= value <= most or value == math.inf:  # NaN is in no range
        wanted = f"{least:g} or more" if most == math.inf else f"{least:g} to {most:g}"
        raise AdapterLabError(f"'{name}' is out of range", found=str(value), expected=wanted)


def require_rate(name: str, value: float) -> None:
    """Refuse a value of the field ``name`` that is no probability below 1."""
    if not 0 <= value < 1:
        raise AdapterLabError(
            f"'{name}' is out of range", found=str(value), expected="0 to below 1"
        )
