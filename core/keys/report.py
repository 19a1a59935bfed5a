"""What a file's modules matched in a model, as data: for the user, for code, for the web panel."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from ..adapters import ALGORITHMS
from ..archs import ARCHITECTURES, wildcard
from ..errors import AdapterLabError
from .base import FORMATS

_GROUPS = 12  # lines of a text report before the rest is counted
_LONGEST = 400  # letters of a name or reason
_PLURALS = {"bias": "biases"}


@dataclass(frozen=True)
class Match:
    """Where one module of the file goes; ``slice`` is (axis, offset, length), None: all of it."""

    key: str
    slice: tuple[int, int, int] | None
    algorithm: str
    rank: int
    scale: float
    traits: tuple[str, ...] = ()


@dataclass
class Report:
    """The outcome of matching an adapter with a model.

    Attributes:
        name: of the file. format: id of the chosen key format; None where nothing hints at one.
        matched: stem -> match. unmatched: stem -> why, with the nearest known name.
        ignored: stem -> why, of what is no module of the adapter.
        runner_up: (format id, stems it matches), of the next best format if it matches any.
        algorithms: algorithm name -> modules of the file, matched or not.
        architecture: id of the model's. file_architecture: id of the one the file is for.
        strengths: stem -> factor on the user's strength, where it is not 1.
    """

    name: str = ""
    format: str | None = None
    architecture: str | None = None
    file_architecture: str | None = None
    matched: dict[str, Match] = field(default_factory=dict[str, Match])
    unmatched: dict[str, str] = field(default_factory=dict[str, str])
    ignored: dict[str, str] = field(default_factory=dict[str, str])
    runner_up: tuple[str, int] | None = None
    algorithms: Counter[str] = field(default_factory=Counter[str])
    warnings: list[str] = field(default_factory=list[str])
    strengths: dict[str, float] = field(default_factory=dict[str, float])

    @property
    def total(self) -> int:
        """Modules in the file."""
        return len(self.matched) + len(self.unmatched)

    @property
    def verdict(self) -> str:
        """One line: "264 of 266 modules matched (LoRA rank 16, kohya format, FLUX.1)"."""
        facts = [self._algorithms(), f"{self._format()} format" if self.format else ""]
        if self.matched or self.file_architecture == self.architecture:
            facts.append(title(self.architecture) if self.architecture else "")
        else:
            facts.append(f"for {title(self.file_architecture)}")
            facts.append(f"the model is {title(self.architecture)}")
        described = ", ".join(filter(None, facts))
        line = f"{len(self.matched)} of {self.total} modules matched"
        return f"{line} ({described})" if described else line

    @property
    def headline(self) -> str:
        """The shortest line that says it: "FLUX.1 LoKr, kohya: 304 of 304 modules"."""
        architecture = self.file_architecture or self.architecture
        kinds = " + ".join(ALGORITHMS[name].title for name in self.algorithms) or "Adapter"
        what = f"{ARCHITECTURES[architecture].title} {kinds}" if architecture else kinds
        form = f", {self._format()}" if self.format else ""
        return f"{what}{form}: {len(self.matched)} of {self.total} modules"

    def to_text(self) -> str:
        """The verdict, then strengths, warnings, and what did not match, grouped by reason."""
        lines = [self.verdict]
        if self.strengths:
            low, high = min(self.strengths.values()), max(self.strengths.values())
            span = f"{low:g}" if low == high else f"{low:g} to {high:g}"
            count = len(self.strengths)
            modules = f"{count} module{'s' * (count != 1)}"
            lines.append(f"Block weights: {modules} at {span}, the rest at 1")
        lines += (f"Warning: {text}" for text in self.warnings)
        lines += _grouped("Not applied:", self.unmatched)
        lines += _grouped("Left out:", self.ignored)
        return "\n".join(lines)

    def to_dict(self) -> dict[str, object]:
        """The same as JSON-able data, the lines under "verdict" and "headline".

        "matched" holds for each stem key, slice, algorithm, rank, scale, traits and strength.
        """
        matched = {stem: self._row(stem, match) for stem, match in self.matched.items()}
        names = (
            "name", "format", "architecture", "file_architecture", "unmatched", "ignored",
            "runner_up", "warnings",
        )  # fmt: skip
        return {
            "verdict": self.verdict, "headline": self.headline,
            **{name: getattr(self, name) for name in names},
            "matched": matched, "algorithms": dict(self.algorithms),
        }  # fmt: skip

    def error(self) -> AdapterLabError:
        """What to raise where nothing matches and something must: names both architectures."""
        subject = f"'{self.name}'" if self.name else "the adapter"
        form = f", {self._format()} format" if self.format else ""
        count = f"{self.total} module{'s' * (self.total != 1)}"
        reasons = Counter(wildcard(reason)[0] for reason in self.unmatched.values())
        fix = ""
        if self.file_architecture and self.file_architecture != self.architecture:
            fix = f"Load it with {title(self.file_architecture)}"
        elif reasons:
            fix = f"Most often: {reasons.most_common(1)[0][0]}"
        same = self.file_architecture and self.file_architecture == self.architecture
        return AdapterLabError(
            f"Nothing in {subject} {'can be applied' if same else 'fits this model'}",
            found=f"{count} for {title(self.file_architecture)}{form}",
            expected="" if same else f"modules of {title(self.architecture)}",
            fix=fix,
        )

    def _row(self, stem: str, match: Match) -> dict[str, Any]:
        return {**vars(match), "strength": self.strengths.get(stem, 1.0)}

    def _format(self) -> str:
        return FORMATS[self.format].title if self.format else ""

    def _algorithms(self) -> str:
        named: list[str] = []
        for name in self.algorithms:
            matches = [match for match in self.matched.values() if match.algorithm == name]
            ranks = [match.rank for match in matches]
            low, high = (min(ranks), max(ranks)) if ranks else (0, 0)
            rank = f" rank {low}" if low == high else f" rank {low} to {high}"
            traits = dict.fromkeys(_PLURALS.get(t, t) for match in matches for t in match.traits)
            having = f" with {', '.join(traits)}" if traits else ""
            named.append(ALGORITHMS[name].title + (rank if ranks else "") + having)
        return " + ".join(named)


def _grouped(heading: str, reasons: dict[str, str]) -> list[str]:
    """``heading`` and a line for each group of stems that differ in numbers only; [] for none."""
    groups: dict[tuple[str, str], list[str]] = {}
    for stem, reason in reasons.items():
        groups.setdefault((wildcard(stem)[0], wildcard(reason)[0]), []).append(stem)
    lines = [heading] if groups else []
    for (pattern, general), stems in list(groups.items())[:_GROUPS]:
        alone = len(stems) == 1
        name = stems[0] if alone else f"{len(stems)} x {pattern}"
        lines.append(f"  {_shown(name)}: {_shown(reasons[stems[0]] if alone else general)}")
    rest = list(groups.values())[_GROUPS:]
    return [*lines, f"  and {sum(map(len, rest))} more"] if rest else lines


def _shown(text: str) -> str:
    """``text`` of a stranger's file, short and without what would change how a line reads."""
    plain = "".join(c if c.isprintable() else "?" for c in text)
    return plain if len(plain) <= _LONGEST else f"{plain[: _LONGEST - 1]}…"


def title(architecture: str | None) -> str:
    """An architecture as users write it."""
    return ARCHITECTURES[architecture].title if architecture else "an unknown architecture"
