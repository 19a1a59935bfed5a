"""What quantising did to each layer, as data: for the user, for code, for the web panel."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

from ..merge.outcome import counted, shortened
from .encode import Quality

_NAMED = 3  # names of a reason before the rest is counted
_BLOCK = re.compile(r"(?<=\.)\d+(?=\.)")  # the number of a block in a path
_UNITS: tuple[tuple[float, str, int], ...] = ((1e9, "GB", 2), (1e6, "MB", 1), (1e3, "kB", 1))


@dataclass(frozen=True)
class Layer(Quality):
    """One layer.

    Attributes:
        before, after: bytes of its weight and of what belongs to it. numbers: of its weight.
    """

    before: int
    after: int
    numbers: int


@dataclass
class Report:
    """What became of a model.

    Attributes:
        format: title of the format. architecture: title, or "unknown architecture".
        layers: path -> what it lost. kept: path of a linear layer -> why it stays as it is.
        before, after: bytes of the tensors.
        facts: (name, value) of the whole. warnings: what the user should know.
    """

    format: str
    architecture: str
    layers: dict[str, Layer] = field(default_factory=dict[str, Layer])
    kept: dict[str, str] = field(default_factory=dict[str, str])
    before: int = 0
    after: int = 0
    facts: list[tuple[str, str]] = field(default_factory=list[tuple[str, str]])
    warnings: list[str] = field(default_factory=list[str])

    @property
    def verdict(self) -> str:
        """One line."""
        layers = counted(len(self.layers), "layer")
        return f"{self.architecture}: {layers} to {self.format}, {sizes(self.before, self.after)}"

    @property
    def worst(self) -> list[tuple[str, Layer]]:
        """Layers, the largest error first."""
        return sorted(self.layers.items(), key=lambda item: -item[1].error)

    @property
    def error(self) -> float:
        """The layers' mean error, each as often as it has numbers."""
        missed = sum(layer.error * layer.numbers for layer in self.layers.values())
        return missed / max(self._numbers, 1)

    @property
    def bits(self) -> float:
        """Of a quantised number, its share of scales and marks included."""
        return 8 * sum(layer.after for layer in self.layers.values()) / max(self._numbers, 1)

    @property
    def _numbers(self) -> int:
        return sum(layer.numbers for layer in self.layers.values())

    @property
    def summary(self) -> str:
        """The verdict and the warnings."""
        return "\n".join([self.verdict, *(f"Warning: {text}" for text in self.warnings)])

    def totals(self) -> Iterator[tuple[str, str]]:
        """(name, value) of what the layers sum up to."""
        if not self.layers:
            return
        path, layer = self.worst[0]
        yield "error", f"{self.error:.2%} on average, at most {layer.error:.2%} ({path})"
        yield "bits a number", f"{self.bits:.2f} in the quantised layers"
        # A file that was quantised before, by weights that are plain now.
        grown = self.after - self.before
        share = abs(grown) / max(self.before, 1)
        yield "grown" if grown > 0 else "saved", f"{sizes(abs(grown))}, {share:.0%} of the file"
        rest = self.after - sum(one.after for one in self.layers.values())
        kept = counted(len(self.kept), "linear layer")
        yield "kept", f"{kept} as they are; all that is not quantised is {sizes(rest)}"

    def to_text(self) -> str:
        """Verdict, warnings, facts, then the layers with the largest errors first."""
        facts = [*self.totals(), *self.facts]
        lines = [self.summary, *(f"{name}: {value}" for name, value in facts)]
        lines += shortened(_line(*item) for item in self.worst)
        lines += shortened(f"kept: {text}" for text in self._reasons())
        return "\n".join(lines)

    def to_dict(self) -> dict[str, Any]:
        """Everything, in plain types; "text" is what the panel shows above the tables."""
        return {
            "text": self.summary,
            "verdict": self.verdict,
            "layers": {path: asdict(layer) for path, layer in self.worst},
            "kept": dict(self.kept),
            "before": self.before,
            "after": self.after,
            "error": self.error,
            "bits": self.bits,
            "facts": [list(fact) for fact in (*self.totals(), *self.facts)],
            "warnings": list(self.warnings),
        }

    def _reasons(self) -> Iterator[str]:
        """Why layers are kept, the most frequent reason first."""
        reasons: dict[str, list[str]] = {}
        for path, why in self.kept.items():
            reasons.setdefault(why, []).append(path)
        for why, paths in sorted(reasons.items(), key=lambda item: -len(item[1])):
            yield f"{why}: {', '.join(paths if len(paths) <= _NAMED + 1 else _by_name(paths))}"


def _by_name(paths: list[str]) -> Iterator[str]:
    """The most frequent names as "blocks.*.mod (38)" for those of many blocks, then a count."""
    stacks = Counter(_BLOCK.sub("*", path) for path in paths)
    for stack, count in stacks.most_common(_NAMED):
        yield f"{stack} ({count})" if count > 1 else stack
    if more := len(paths) - sum(count for _, count in stacks.most_common(_NAMED)):
        yield f"{more} more"


def sizes(*counts: int) -> str:
    """ "23.80 GB", or of several "23.80 GB -> 12.10 GB", in the unit of the first."""
    unit, name, digits = _unit(counts[0])
    return " -> ".join(f"{count / unit:.{digits}f} {name}" for count in counts)


def progress(done: int, total: int) -> str:
    """ "1.25 of 23.80 GB"."""
    unit, name, digits = _unit(total)
    return f"{done / unit:.{digits}f} of {total / unit:.{digits}f} {name}"


def _unit(count: int) -> tuple[float, str, int]:
    return next((row for row in _UNITS if count >= row[0]), (1, "bytes", 0))


def _line(path: str, layer: Layer) -> str:
    return (
        f"{path}: error {layer.error:.2%}, {layer.saturated:.2%} saturated, "
        f"{layer.subnormal:.2%} subnormal, {sizes(layer.before, layer.after)}"
    )
