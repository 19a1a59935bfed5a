"""Strengths by part of a model, as text: lines ``pattern = weight``."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass

from ..archs import ArchSpec
from ..errors import AdapterLabError

GROUPS = {
    "all": ("*",),
    "attention": ("*attn*", "*attention*"),
    "mlp": ("*mlp*", "*ff.*", "*ff_context.*", "*ffn*", "*feed_forward*", "*linear2"),
    "norm": ("*norm*",),
    "modulation": ("*mod.lin*", "*modulation*", "*_mod.1"),
    "text_encoder": ("clip_*", "t5*", "umt5*", "llama*", "gemma*", "qwen*"),
}
_EXAMPLE = "a line such as 'double_blocks.3 = 0.5', '*.attn.* = 0' or '@attention = 0.8'"


@dataclass(frozen=True)
class BlockWeight:
    """One line: what it says, and the paths it hits."""

    text: str
    weight: float
    hits: re.Pattern[str]


class BlockWeights:
    """Weights by module path; what no line hits has 1, of two lines the later one wins."""

    def __init__(self, lines: Iterable[BlockWeight] = ()) -> None:
        self.lines = tuple(lines)

    def __bool__(self) -> bool:
        return bool(self.lines)

    def weight_of(self, path: str, part: str = "model") -> float:
        """The factor on the strength of the module ``path``, a text encoder's below its part."""
        line = self._line(path if part == "model" else f"{part}.{path}")
        return 1.0 if line is None else line.weight

    def unused(self, places: Iterable[tuple[str, str]]) -> list[str]:
        """The lines that hit none of ``places``, (path, part) of every module."""
        names = [path if part == "model" else f"{part}.{path}" for path, part in places]
        return [line.text for line in self.lines if not any(map(line.hits.fullmatch, names))]

    def _line(self, name: str) -> BlockWeight | None:
        return next((line for line in reversed(self.lines) if line.hits.fullmatch(name)), None)


def parse(text: str, spec: ArchSpec | None = None) -> BlockWeights:
    """The weights that ``text`` spells.

    A pattern is a path in the model's own names or a glob over paths (``*`` any characters,
    ``{0-9}`` a number of that range) and hits everything below what it names; ``@name`` is a group
    of the architecture or one of ``GROUPS``. ``#`` starts a comment, blank lines count for nothing.

    Raises:
        AdapterLabError: a line that is none, a weight that is no number, an unknown group.
    """
    lines = ((n, raw.partition("#")[0].strip()) for n, raw in enumerate(text.splitlines(), 1))
    return BlockWeights(_parse_line(n, line, spec) for n, line in lines if line)


def groups(spec: ArchSpec | None) -> dict[str, tuple[str, ...]]:
    """The groups a model has, name -> patterns: the general ones and its architecture's."""
    return {**GROUPS, **(spec.groups if spec else {})}


def _parse_line(number: int, line: str, spec: ArchSpec | None) -> BlockWeight:
    where = f"Line {number} of the block weights"
    pattern, equals, value = (piece.strip() for piece in line.rpartition("="))
    try:
        weight = float(value)
    except ValueError:
        weight = math.nan
    if not (pattern and equals and math.isfinite(weight)):
        raise AdapterLabError(f"{where} is not understood", found=f"'{line}'", expected=_EXAMPLE)
    known = groups(spec)
    if pattern.startswith("@") and pattern[1:] not in known:
        names = ", ".join(f"@{name}" for name in known)
        raise AdapterLabError(f"{where} names no group", found=pattern, expected=names)
    patterns = known[pattern[1:]] if pattern.startswith("@") else (pattern,)
    either = "|".join(map(_regex, patterns))
    return BlockWeight(line, weight, re.compile(rf"(?:{either})(?:\..*)?", re.DOTALL))


def _regex(pattern: str) -> str:
    """A glob as a regex; the numbers of a range one by one."""
    pieces = re.split(r"(\{\d+-\d+\})", pattern)
    return "".join(_numbers(p) if n % 2 else _glob(p) for n, p in enumerate(pieces))


def _numbers(span: str) -> str:
    first, last = map(int, span[1:-1].split("-"))
    return "(?:" + "|".join(map(str, range(first, min(last, first + 9999) + 1))) + ")"


def _glob(pattern: str) -> str:
    return re.escape(pattern).replace(r"\*", ".*").replace(r"\?", ".")
