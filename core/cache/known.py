"""What a run may go by, and the settings that belong to it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from ..checks import require_choice, require_range
from .magcache import Rule, interpolated
from .published import BRANCHES, PLAIN, Published, Setting, Special

AUTO = -1  # a setting that is left to the ratios' authors
NAMES = ("threshold", "k", "retention")
# Where nobody recommends any for the model, by what the errors are errors of.
DEFAULTS = {
    "magnitude": Setting(0.09, 4, 0.2, "general"),
    "extrapolation": Setting(0.08, 4, 0.2, "general"),
}


class Known(Protocol):
    """Numbers for any schedule, one a step; no bends where those are not known."""

    def ratios(self, branch: str, sigmas: Sequence[float]) -> Sequence[float]: ...

    def bends(self, branch: str, sigmas: Sequence[float]) -> Sequence[float]: ...


@dataclass(frozen=True)
class Lists:
    """Ratios by the number of the step, whatever its noise level."""

    of: Mapping[str, Sequence[float]]

    def ratios(self, branch: str, sigmas: Sequence[float]) -> Sequence[float]:
        """The nearest of the list of "cond" or "uncond"."""
        return interpolated(self.of[branch], len(sigmas))

    def bends(self, branch: str, sigmas: Sequence[float]) -> Sequence[float]:
        """None: lists are of magnitudes."""
        return ()


@dataclass(frozen=True)
class Found:
    """Ratios and what holds with them.

    Attributes:
        name: as users read it.
        settings: that their authors recommend, the best quality first.
    """

    name: str
    known: Known
    special: Special = PLAIN
    settings: Sequence[Setting] = ()


def listed(one: Published) -> Found:
    """A published list."""
    lists = Lists({branch: one.branch(branch) for branch in BRANCHES})
    return Found(f"published {one.name}", lists, one.special, one.settings)


def rule_for(
    given: Mapping[str, float | None],
    found: Found | None,
    errors: str = "magnitude",
    *,
    guard_last: bool = True,
) -> Rule:
    """The user's settings and, for those left open, the first that are recommended with ``found``.

    Args:
        given: threshold, k and retention; None or -1 where they are left open.
        errors: of what the threshold is for: "magnitude" or "extrapolation".

    Raises:
        AdapterLabError: one is out of range.
    """
    require_choice("errors", errors, DEFAULTS)
    # Recommended thresholds are for errors of the magnitude.
    advised = found.settings[:1] if found and errors == "magnitude" else ()
    best = advised[0] if advised else DEFAULTS[errors]
    settings = {name: getattr(best, name) for name in NAMES} | _set(given)
    require_range("k", settings["k"], 0)
    special = found.special if found else PLAIN
    threshold, k, retention = settings["threshold"], int(settings["k"]), settings["retention"]
    return Rule(threshold, k, retention, guard_last, special)


def advice(given: Mapping[str, float | None], found: Found) -> str:
    """What of several recommended settings is used, where the user left them open; else ""."""
    names = [name for name in NAMES if name not in _set(given)]
    rows = [", ".join(f"{name} {getattr(s, name):g}" for name in names) for s in found.settings]
    rows = list(dict.fromkeys(rows))
    if not names or len(rows) < 2:
        return ""
    return f"Set for quality ({rows[0]}); for speed its authors recommend {' or '.join(rows[1:])}"


def _set(given: Mapping[str, float | None]) -> dict[str, float]:
    return {name: v for name, v in given.items() if v is not None and v != AUTO}
