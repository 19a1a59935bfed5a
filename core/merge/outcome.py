"""What a tool did to each module, as data: for the user, for code, for the web panel."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from typing import Any

_SHOWN = 12  # lines of a text before the rest is counted


@dataclass(frozen=True)
class Row:
    """One module of the result.

    Attributes:
        made: what it is now ("LoRA"). rank: of that, None where it has none.
        error: ||dW' - dW|| / ||dW||, None where it is exact.
        note: anything worth saying.
    """

    made: str
    rank: int | None = None
    error: float | None = None
    note: str = ""


@dataclass
class Outcome:
    """What became of the modules.

    Attributes:
        verdict: one line.
        rows: module -> what it is now. left_out: module -> why it is not in the result.
        facts: (name, value) of the whole. warnings: what the user should know.
    """

    verdict: str = ""
    rows: dict[str, Row] = field(default_factory=dict[str, Row])
    left_out: dict[str, str] = field(default_factory=dict[str, str])
    facts: list[tuple[str, str]] = field(default_factory=list[tuple[str, str]])
    warnings: list[str] = field(default_factory=list[str])

    @property
    def error(self) -> float:
        """The largest error of a module."""
        return max((row.error for row in self.rows.values() if row.error is not None), default=0.0)

    @property
    def summary(self) -> str:
        """The verdict and the warnings."""
        return "\n".join([self.verdict, *(f"Warning: {text}" for text in self.warnings)])

    def to_text(self) -> str:
        """Verdict, warnings, facts, then the modules with the largest errors first."""
        lines = [self.summary, *(f"{name}: {value}" for name, value in self.facts)]
        worst = sorted(self.rows.items(), key=lambda item: -(item[1].error or 0.0))
        lines += shortened(_line(name, row) for name, row in worst)
        lines += shortened(f"left out: {name}: {why}" for name, why in self.left_out.items())
        return "\n".join(lines)

    def to_dict(self) -> dict[str, Any]:
        """Everything, in plain types; "text" is what the panel shows above the tables."""
        return {
            "text": self.summary,
            "verdict": self.verdict,
            "rows": {name: asdict(row) for name, row in self.rows.items()},
            "left_out": dict(self.left_out),
            "facts": [list(fact) for fact in self.facts],
            "warnings": list(self.warnings),
        }


def counted(count: int, noun: str) -> str:
    """ "1 module", "2 modules"."""
    return f"{count} {noun}{'s' * (count != 1)}"


def mebibytes(*sizes: int) -> str:
    """ "1.50 MiB", or of several "1.50 MiB -> 0.75 MiB"."""
    return " -> ".join(f"{size / 2**20:.2f} MiB" for size in sizes)


def _line(name: str, row: Row) -> str:
    rank = "" if row.rank is None else f" {row.rank}"
    error = "" if row.error is None else f", error {row.error:.2%}"
    return f"{name}: {row.made}{rank}{error}{', ' + row.note if row.note else ''}"


def shortened(lines: Iterable[str]) -> list[str]:
    """The first lines, and how many more there are."""
    found = list(lines)
    more = len(found) - _SHOWN
    return [*found[:_SHOWN], f"... and {more} more"] if more > 1 else found
